"""The trainer's engine with ways to die: `python -m tests.engines.mortal FD`. A document that
begins with POISON ends it, and so do the fault points behind each kind of job. One that begins with
ODD is computed, and then arithmetic fails. Its store may be bad: see tests.engines.bad_store.
"""

import os

from mint_core.fault_points import fault_point
from tests.engines import bad_store
from trainer_service.engine import __main__ as process
from trainer_service.engine.engine import Engine
from trainer_service.jobs import Plan, StepRows

POISON, ODD = [13, 13, 13], [17, 17, 17]  # tokens
ODD_RATE = 0.017  # of a step, as ODD


class MortalEngine(Engine):
    def run(self, job: object) -> object:
        if _begins(job, POISON):
            os._exit(9)
        answer = super().run(job)
        if _begins(job, ODD) or (isinstance(job, StepRows) and _is_odd(job)):
            raise ZeroDivisionError
        fault_point(f"engine:after-{type(job).__name__}")
        return answer


def _begins(job: object, tokens: list[int]) -> bool:
    documents = (d for tile in job.tiles for d in tile.documents) if isinstance(job, Plan) else ()
    return any(document.tokens[: len(tokens)].tolist() == tokens for document in documents)


def _is_odd(job: StepRows) -> bool:
    return any(step.adam_params.learning_rate == ODD_RATE for step in job.steps)


if __name__ == "__main__":
    bad_store.install()
    process.Engine = MortalEngine  # type: ignore[misc]  # the process makes whatever it has there
    process.main()

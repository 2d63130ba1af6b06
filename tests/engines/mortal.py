"""The trainer's engine with ways to die: `python -m tests.engines.mortal FD`. A document that
begins with POISON ends it, and so do the fault points behind each kind of job. One that begins with
ODD is computed, and then arithmetic fails. Its store may be bad: see tests.engines.bad_store.
"""

import os
from collections.abc import Callable
from dataclasses import replace

from mint_core.fault_points import fault_point
from tests.engines import bad_store
from trainer_service.config import TrainerConfig
from trainer_service.engine import __main__ as process
from trainer_service.engine.engine import Engine
from trainer_service.jobs import DropRow, Plan, StepRows

POISON, ODD = [13, 13, 13], [17, 17, 17]  # tokens
ODD_RATE = 0.017  # of a step, as ODD


ROW_BYTES = 600_000  # in memory: seven parts of rank 8 of the tests' models


class MortalEngine(Engine):
    def __init__(self, config: TrainerConfig, progress: Callable[[], None]) -> None:
        super().__init__(config, progress)
        self._rows._device.limit_bytes = ROW_BYTES
        self._dropped = ["never made"]
        self._jobs = 0

    def run(self, job: object) -> object:
        if isinstance(job, Plan | StepRows):
            job = replace(job, coming=self._misled(job))
        if isinstance(job, DropRow):
            self._dropped.append(job.training_run_id)
        if _begins(job, POISON):
            os._exit(9)
        answer = super().run(job)
        if _begins(job, ODD) or (isinstance(job, StepRows) and _is_odd(job)):
            raise ZeroDivisionError
        fault_point(f"engine:after-{type(job).__name__}")
        return answer

    def _misled(self, job: Plan | StepRows) -> tuple[str, ...]:
        """Runs that are gone, that are at work, twice, in a wrong order, or none, in turn."""
        self._jobs += 1
        work = job.tiles if isinstance(job, Plan) else job.steps
        everybody = tuple(self._rows._rows)
        return (
            (self._dropped[-1], *job.coming),
            (*(each.training_run_id for each in work), *everybody),
            (*reversed(everybody), *job.coming),
            (*everybody[::2], *everybody[::2]),
            (),
        )[self._jobs % 5]


def _begins(job: object, tokens: list[int]) -> bool:
    documents = (d for tile in job.tiles for d in tile.documents) if isinstance(job, Plan) else ()
    return any(document.tokens[: len(tokens)].tolist() == tokens for document in documents)


def _is_odd(job: StepRows) -> bool:
    return any(step.adam_params.learning_rate == ODD_RATE for step in job.steps)


if __name__ == "__main__":
    bad_store.install()
    process.Engine = MortalEngine  # type: ignore[misc]  # the process makes whatever it has there
    process.main()

"""The trainer's engine with ways to die: `python -m tests.engines.mortal FD`. A document that
begins with POISON ends it, and so do the fault points behind each kind of job. Its store may be
bad: see tests.engines.bad_store.
"""

import os

from mint_core.fault_points import fault_point
from tests.engines import bad_store
from trainer_service.engine import __main__ as process
from trainer_service.engine.engine import Engine
from trainer_service.jobs import Plan

POISON = [13, 13, 13]  # tokens


class MortalEngine(Engine):
    def run(self, job: object) -> object:
        if isinstance(job, Plan):
            documents = (document for tile in job.tiles for document in tile.documents)
            if any(document.tokens[: len(POISON)].tolist() == POISON for document in documents):
                os._exit(9)
        answer = super().run(job)
        fault_point(f"engine:after-{type(job).__name__}")
        return answer


if __name__ == "__main__":
    bad_store.install()
    process.Engine = MortalEngine  # type: ignore[misc]  # the process makes whatever it has there
    process.main()

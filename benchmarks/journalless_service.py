"""The trainer as it would be if it promised nothing: nothing is written, and answers leave at once.
`python -m benchmarks.journalless_service ...`.
"""

import asyncio
import sqlite3
import sys
from collections.abc import Callable
from typing import TypeVar

from mint_core.hosting.service_main import run_service
from trainer_service.config import TrainerConfig
from trainer_service.journal.writer import Journal, Statement
from trainer_service.recovery import durability
from trainer_service.service import TrainerService

T = TypeVar("T")


class NoJournal(Journal):
    def write(self, *statements: Statement, then: Callable[[], None] | None = None) -> None:
        if then is not None:
            asyncio.get_running_loop().call_soon(then)

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        return query(self.database)

    async def flush(self) -> None:
        pass


def main() -> int:
    durability.Journal = NoJournal  # type: ignore[misc]  # it makes whatever it has there
    return run_service("trainer", TrainerConfig, TrainerService, "Trains.")


if __name__ == "__main__":
    sys.exit(main())

"""The trainer as it would be if it promised nothing: nothing is written, and answers leave at once.
`python -m benchmarks.journalless_service ...`.
"""

import asyncio
import sqlite3
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mint_core.hosting.service_main import run_service
from trainer_service import service
from trainer_service.config import TrainerConfig
from trainer_service.journal.writer import Journal, Statement, Written
from trainer_service.service import TrainerService

T = TypeVar("T")


class Nowhere:
    """A database that takes everything and keeps nothing."""

    def execute(self, statement: str, *values: object) -> "Nowhere":
        self._none = "FROM saved_rows" in statement
        return self

    executemany = execute

    def fetchone(self) -> tuple[int] | None:
        return None if self._none else (0,)

    def __iter__(self) -> Iterator[tuple[int]]:
        return iter(())


class NoJournal(Journal):
    def write(self, *statements: Statement, soon: bool = True) -> Written:
        written: Written = asyncio.get_running_loop().create_future()
        nowhere: Any = Nowhere()
        written.set_result(statements[-1](nowhere))  # which may be the answer
        return written

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        return query(self.database)

    async def flush(self) -> None:
        pass


def main() -> int:
    service.Journal = NoJournal  # type: ignore[misc]  # it makes whatever it has there
    return run_service("trainer", TrainerConfig, TrainerService)


if __name__ == "__main__":
    sys.exit(main())

"""A trainer's journal as others may see it, and damage to it: the tables that hold what is a run's
own, as trainer_service/journal/schema.py says.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Literal

ROWS = "snapshots"  # folder of the saved rows
# What is a run's in each table: by its number, or by calls, whose ids begin with it.
_OF_RUN = {
    "runs": "number = ?",
    "states": "run = ?",
    "saved_rows": "run = ?",
    "calls": "id >> 32 = ?",
    "payloads": "id >> 32 = ?",
    "answers": "id >> 32 = ?",
}
MOST_BYTES = 4  # that one damage changes
Damage = Literal["waiting", "done"]  # what the call was whose request it is


@contextmanager
def _opened(state: Path) -> Iterator[sqlite3.Connection]:
    location = f"file:{state}/journal.db?mode=rw"  # not made if it is not there
    with closing(sqlite3.connect(location, uri=True, timeout=30)) as database, database:
        yield database


def number_of(state: Path, run: str) -> int:
    """Under which a run's records are found; no number is given twice."""
    with _opened(state) as database:
        query = "SELECT number FROM runs WHERE training_run_id = ?"
        (number,) = database.execute(query, (run,)).fetchone()
    return int(number)


def left_of(state: Path, number: int) -> list[str]:
    """The tables that hold anything of a run."""
    with _opened(state) as database:
        return [
            table
            for table, condition in _OF_RUN.items()
            if database.execute(f"SELECT 1 FROM {table} WHERE {condition}", (number,)).fetchone()
        ]


def damage(state: Path, number: int, random: Random) -> Damage | None:
    """Changes a few bytes of one request of a run, if there is one. Nobody may have the journal
    open.
    """
    with _opened(state) as database:
        query = "SELECT id, payload, effect IS NULL FROM payloads JOIN calls USING (id)"
        found = database.execute(f"{query} WHERE {_OF_RUN['payloads']}", (number,)).fetchall()
        if not found:
            return None
        call, payload, waits = random.choice(found)
        content = bytearray(payload)
        for place in random.sample(range(len(content)), random.randint(1, MOST_BYTES)):
            content[place] ^= 0xFF
        database.execute("UPDATE payloads SET payload = ? WHERE id = ?", (bytes(content), call))
    return "waiting" if waits else "done"

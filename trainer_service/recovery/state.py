"""`python -m trainer_service.recovery.state FOLDER inspect|verify|backup TARGET`: what is in a
state folder, whether all of it is there and right, and a copy. The server may run meanwhile.
"""

import argparse
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mint_core.durable_files import flush_folder, make_folder
from mint_core.errors import FailedPrecondition, MintError
from trainer_service.config import SAVED_ROWS
from trainer_service.journal import queries, records
from trainer_service.journal.codec import decode_origin
from trainer_service.journal.schema import DATABASE, MIGRATIONS, StateRefused
from trainer_service.recovery.state_check import problems

COLUMNS = ("run", "tenant", "step", "accepted", "in row", "to do again", "unanswered", "row MiB")
MOST_ATTEMPTS = 20  # at a copy of which the server removes a file meanwhile


@contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """The journal of a folder, as it is at one moment. Raises StateRefused."""
    if not (folder / DATABASE).exists():
        raise StateRefused(folder, f"holds no {DATABASE}; give the folder of a trainer's `--state`")
    try:
        with closing(sqlite3.connect(f"file:{folder / DATABASE}?mode=ro", uri=True)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version != len(MIGRATIONS):
                why = f"has schema {version}, and this version reads {len(MIGRATIONS)}"
                raise StateRefused(folder, why)
            database.execute("BEGIN")
            yield database
    except sqlite3.Error as error:
        raise StateRefused(folder, f"holds a journal that cannot be read: {error}") from error


def inspect(folder: Path) -> list[str]:
    """What the folder holds, in lines."""
    with reading(folder) as database:
        server = queries.load_server(database)
        lines = [
            f"base model {server.get('base_model', 'unknown')}"
            f" {server.get('base_fingerprint', '')}".rstrip(),
            f"journal    {(folder / DATABASE).stat().st_size / 2**20:.1f} MiB",
            f"requests   {len(list(queries.load_requests(database)))} remembered",
        ]
        rows = [COLUMNS, *(_run_row(database, record) for record in queries.load_runs(database))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return lines + ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _run_row(database: sqlite3.Connection, record: records.RunRecord) -> tuple[str, ...]:
    origin = decode_origin(record.origin)
    calls = list(queries.load_calls(database, record.number, record.state.dropped))
    accepted = max([call.sequence for call in calls], default=record.state.dropped)
    row = queries.load_saved_row(database, record.number)
    covered, size_bytes = (row.sequence, row.size_bytes) if row else (0, 0)
    again = len(queries.load_past(database, record.number))
    unanswered = sum(call.answer is None for call in calls)
    numbers = map(str, (record.state.step, accepted, covered, again, unanswered))
    return (origin.training_run_id, origin.tenant, *numbers, f"{size_bytes / 2**20:.1f}")


def verify(folder: Path) -> list[str]:
    """All that is missing or wrong; nothing if the folder is whole."""
    with reading(folder) as database:
        return list(problems(database, folder / SAVED_ROWS))


def backup(folder: Path, target: Path) -> None:
    """Copies a folder, as it is at one moment, to one that is empty or new."""
    if target.exists() and any(target.iterdir()):
        raise FailedPrecondition(f"{target} is not empty; give a new folder")
    make_folder(target / SAVED_ROWS)
    target.chmod(0o700)
    for _ in range(MOST_ATTEMPTS):
        wanted = _copy_journal(folder, target)
        if all(_copied(folder, target, name) for name in wanted):
            break  # else: the server has replaced a row, and the journal too
    else:
        raise FailedPrecondition(f"{folder} changes faster than it can be copied; try again")
    for path in (target / SAVED_ROWS).iterdir():
        if path.name not in wanted:
            path.unlink()
    flush_folder(target / SAVED_ROWS)
    flush_folder(target)


def _copy_journal(folder: Path, target: Path) -> list[str]:
    """Copies the database; returns the names of the rows' files that it tells of."""
    with (
        reading(folder) as database,
        closing(sqlite3.connect(target / DATABASE)) as copy,
    ):
        database.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, whole
        return [file for (file,) in copy.execute("SELECT file FROM saved_rows")]


def _copied(folder: Path, target: Path, name: str) -> bool:
    """Whether a row's file is in the copy now."""
    copy = target / SAVED_ROWS / name
    if copy.exists():
        return True
    draft = copy.with_name(f".{name}.draft")
    try:
        shutil.copyfile(folder / SAVED_ROWS / name, draft)
    except FileNotFoundError:
        return False
    draft.rename(copy)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer_service.recovery.state", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="of a trainer's `--state`")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("inspect", help="what is in it")
    commands.add_parser("verify", help="whether it is whole; status 1 if not")
    commands.add_parser("backup", help="copies it").add_argument("target", type=Path)
    asked = parser.parse_args()
    try:
        lines, status = _run(asked)
    except MintError as error:
        lines, status = [error.message], 1
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return status


def _run(asked: argparse.Namespace) -> tuple[list[str], int]:
    match asked.command:
        case "inspect":
            return inspect(asked.folder), 0
        case "backup":
            backup(asked.folder, asked.target)
            return [f"copied to {asked.target}"], 0
    found = verify(asked.folder)
    return found or ["whole"], int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

"""The journal's tables, and what keeps a database from being used."""

import fcntl
import itertools
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from mint_core.durable_files import flush_folder, make_folder
from mint_core.errors import FailedPrecondition
from trainer_service.config import SAVED_ROWS
from trainer_service.journal.first_version import encode_answers, keep_last_number

DATABASE = "journal.db"
_LOCK = "lock"
MIN_FREE_BYTES = 64 * 1024 * 1024  # at start
# Small: a step changes a few dozen bytes on each of a dozen pages, all of which are written, twice.
_PAGE_BYTES = 2048
KEPT_LOG_BYTES = 8 * 1024 * 1024
_APPLICATION = 0x6D696E74  # "mint", in the database's header

# A call's `id` is its run's number and its sequence in one: rows lie in the order of a run's calls,
# and one tree finds them. What is large and short-lived (requests, answers) has tables of its own,
# since to change a row is to write all of it again.
_FIRST = """
CREATE TABLE server (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (
    number INTEGER PRIMARY KEY,
    training_run_id TEXT NOT NULL UNIQUE,
    origin TEXT NOT NULL, -- JSON
    metadata TEXT NOT NULL, -- JSON
    retention_s REAL NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0 -- kept because plans of other runs hold its tiles
);
CREATE TABLE states (
    run INTEGER PRIMARY KEY,
    step INTEGER NOT NULL,
    writer_epoch INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL,
    backward_count INTEGER NOT NULL,
    added INTEGER NOT NULL,
    failed_sequence INTEGER,
    update_time REAL NOT NULL,
    inexact_replays INTEGER NOT NULL,
    inexact_note TEXT NOT NULL
);
CREATE TABLE calls (
    id INTEGER PRIMARY KEY,
    method TEXT NOT NULL,
    hash BLOB NOT NULL,
    effect INTEGER, -- on the row; NULL: it has not ended
    digest INTEGER, -- of the weights after a step
    deaths INTEGER NOT NULL DEFAULT 0 -- of engines that had it
);
CREATE TABLE payloads (id INTEGER PRIMARY KEY, payload BLOB NOT NULL);
CREATE TABLE answers (id INTEGER PRIMARY KEY, answer BLOB NOT NULL);
CREATE TABLE tiles (
    plan INTEGER NOT NULL,
    place INTEGER NOT NULL, -- in the plan
    call INTEGER NOT NULL,
    tile INTEGER NOT NULL, -- place in the call
    first INTEGER NOT NULL, -- document
    documents INTEGER NOT NULL,
    PRIMARY KEY (plan, place)
) WITHOUT ROWID;
CREATE INDEX tiles_by_call ON tiles (call);
CREATE TABLE snapshots (
    run INTEGER PRIMARY KEY,
    sequence INTEGER NOT NULL, -- of the last call that is in it
    file TEXT NOT NULL,
    size_bytes INTEGER NOT NULL
);
CREATE TABLE requests (
    tenant TEXT NOT NULL,
    request_id TEXT NOT NULL,
    hash BLOB NOT NULL,
    answer TEXT NOT NULL, -- JSON
    time REAL NOT NULL,
    PRIMARY KEY (tenant, request_id)
) WITHOUT ROWID;
"""
# An answer is bytes; a pass needs no record of its own, since a run's calls are replayed by
# themselves; numbers of runs are never given twice; a run that is being deleted says so.
_SECOND = """
DROP TABLE tiles;
ALTER TABLE snapshots RENAME TO saved_rows;
DELETE FROM runs WHERE deleted;
DELETE FROM calls WHERE id >> 32 NOT IN (SELECT number FROM runs);
DELETE FROM payloads WHERE id NOT IN (SELECT id FROM calls);
DELETE FROM answers WHERE id NOT IN (SELECT id FROM calls);
ALTER TABLE runs DROP COLUMN deleted;
-- NULL: it is not being deleted; 1: with its named checkpoints
ALTER TABLE runs ADD COLUMN removing INTEGER;
ALTER TABLE calls ADD COLUMN mark TEXT NOT NULL DEFAULT '';
"""
# What is gone is no longer all that was acknowledged, and no more.
_THIRD = """
ALTER TABLE states ADD COLUMN dropped INTEGER NOT NULL DEFAULT 0;
UPDATE states SET dropped = acknowledged;
"""
Migration = str | Callable[[sqlite3.Connection], None]
# Each brings a database from its place in the list to the next version; they are never changed.
MIGRATIONS: Sequence[Sequence[Migration]] = (
    (_FIRST,),
    (keep_last_number, _SECOND, encode_answers),
    (_THIRD,),
)


class StateRefused(FailedPrecondition):
    """The state folder cannot be used."""

    reason = "STATE_UNUSABLE"

    def __init__(self, folder: Path, why: str) -> None:
        super().__init__(f"`state` {folder} {why}")


def lock_folder(folder: Path) -> int:
    """Makes the folder and locks it until the descriptor is closed, or the process has ended."""
    try:
        for made in (folder, folder / SAVED_ROWS):
            make_folder(made)
            made.chmod(0o700)  # whatever the umask, and whoever made it
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StateRefused(folder, f"cannot be used: {error.strerror}; choose another") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        why = f"is in use by another trainer (process {holder or 'unknown'}); stop it"
        raise StateRefused(folder, f"{why}, or choose another folder") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        os.close(descriptor)
        need = f"and needs {MIN_FREE_BYTES // 2**20}; free some, or choose another"
        raise StateRefused(folder, f"has {free // 2**20} MiB of free space {need}")
    return descriptor


def open_database(folder: Path) -> sqlite3.Connection:
    """Opens the database of a locked folder, making or migrating it. Raises StateRefused."""
    try:
        database = _open(folder)
        flush_folder(folder)
    except sqlite3.Error as error:
        problem = " ".join(str(error).split())
        why = f"holds a journal that cannot be used ({problem}); "
        remedy = "restore it from a backup, or choose another folder to start without its runs"
        raise StateRefused(folder, why + remedy) from error
    return database


def _open(folder: Path) -> sqlite3.Connection:
    # SQLite gives its log the mode that the database has.
    os.close(os.open(folder / DATABASE, os.O_RDWR | os.O_CREAT, 0o600))
    (folder / DATABASE).chmod(0o600)
    database = sqlite3.connect(
        folder / DATABASE,
        isolation_level=None,  # transactions are begun and ended in so many words
        check_same_thread=False,  # it is handed to the journal's thread
    )
    try:
        version = _version(database, folder)
        if version == 0:
            database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        # The log is brought into the database when there is time, see writer.py, and when it has
        # become long. Its file stays: one that need not grow is flushed sooner.
        database.execute(f"PRAGMA wal_autocheckpoint = {KEPT_LOG_BYTES // _PAGE_BYTES}")
        database.execute(f"PRAGMA journal_size_limit = {KEPT_LOG_BYTES}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        migrate(database, version)
    except BaseException:
        database.close()
        raise
    return database


def _version(database: sqlite3.Connection, folder: Path) -> int:
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if application not in (0, _APPLICATION):
        raise StateRefused(folder, f"holds {DATABASE} of another program; choose another folder")
    if version > len(MIGRATIONS):
        why = f"was written by a newer version (schema {version}, this one reads {len(MIGRATIONS)})"
        raise StateRefused(folder, f"{why}; start that version, or choose another folder")
    return int(version)


def migrate(
    database: sqlite3.Connection,
    version: int,
    migrations: Sequence[Sequence[Migration]] = MIGRATIONS,
) -> None:
    """Brings the tables from a version to the newest, all of the way or not at all."""
    database.execute("BEGIN IMMEDIATE")  # a disk that cannot be written shows here
    try:
        for part in itertools.chain.from_iterable(migrations[version:]):
            if callable(part):
                part(database)
                continue
            for statement in part.split(";\n"):
                database.execute(statement)
        database.execute(f"PRAGMA user_version = {len(migrations)}")
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")

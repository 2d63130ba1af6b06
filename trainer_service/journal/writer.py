"""The journal's thread: all that is ready goes to disk in one transaction, with one fsync.

Writes take effect in their order, and `then` is called once they are on disk. What nobody waits
for stays in the open transaction for a moment and goes with the next that somebody waits for.
"""

import asyncio
import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mint_core.errors import MintError, ResourceExhausted, Unavailable
from mint_core.fault_points import fault_point
from trainer_service.journal.schema import DATABASE, lock_folder, open_database

logger = logging.getLogger(__name__)

LINGER_S = 0.1  # how long a write waits that nobody waits for
RETRY_S = 1.0  # after a full disk
IDLE_S = 0.2  # without a write, after which the log is brought into the database
MOST_PAGES_FREED = 2000  # at a time
LONGEST_LOG_BYTES = 32 * 1024 * 1024  # after which it is even while there are writes

T = TypeVar("T")
Statement = Callable[[sqlite3.Connection], Any]


class JournalFull(ResourceExhausted):
    """There is no room for another promise."""

    reason = "JOURNAL_FULL"


class JournalFailed(Unavailable):
    """The disk failed: what is in memory may be ahead of it, so nothing more is answered."""

    reason = "JOURNAL_FAILED"


class _GivenUp(Exception):
    """There was no room before the end."""


@dataclass(frozen=True, slots=True)
class _Entry:
    statements: Sequence[Statement]
    then: Callable[[], None] | None  # on the event loop, once it is on disk
    answer: Callable[[Any], None] | None = None  # on the journal's thread: a read's result


class Journal:
    """One state folder's database. All methods but `close` belong to one event loop."""

    def __init__(self, folder: Path) -> None:
        """Locks and opens the folder. Raises StateRefused."""
        self._lock = lock_folder(folder)
        try:
            self.database = open_database(folder)  # before `start`, and after `close`, for anyone
        except BaseException:
            os.close(self._lock)
            raise
        self._log = folder / f"{DATABASE}-wal"
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="journal")
        self._pending: list[_Entry] = []  # of the transaction
        self._trouble: MintError | None = None
        self._closing = threading.Event()
        self.on_failure: Callable[[MintError], None] = lambda error: None
        self.commits = 0
        self.commit_seconds = 0.0

    def start(self) -> None:
        """Starts the thread; `then` and `on_failure` are called on the loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Blocks until all that was written is on disk; on a full disk the rest is given up."""
        self._closing.set()
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self.database.close()
        os.close(self._lock)

    def trouble(self) -> MintError | None:
        """Why nothing may be accepted now, if so."""
        return self._trouble

    @property
    def failed(self) -> bool:
        """Whether no write will come to disk any more."""
        return isinstance(self._trouble, JournalFailed)

    def write(self, *statements: Statement, then: Callable[[], None] | None = None) -> None:
        """Has statements take effect together; they may be run again, after a full disk."""
        self._queue.put(_Entry(statements, then))

    async def flush(self) -> None:
        """Waits until all that was written before is on disk. Raises JournalFailed."""
        if not self._thread.is_alive():
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.write(then=lambda: _settle(done, None))
        await self._or_failure(done)

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Runs a query behind all that was written before it. Raises JournalFailed."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def answer(result: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_settle, done, result)

        self._queue.put(_Entry((query,), None, answer))
        return await self._or_failure(done)

    async def _or_failure(self, done: "asyncio.Future[T]") -> T:
        while True:
            if self._trouble is not None and self.failed:
                raise self._trouble
            finished, _ = await asyncio.wait({done}, timeout=RETRY_S)
            if finished:
                return done.result()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except sqlite3.Error as error:
            self._fail(error)
        except _GivenUp:
            logger.error("the journal ends on a full disk: what is not on it was never answered")

    def _turn(self) -> bool:
        """Takes what is ready and writes it. Returns whether there is more to come."""
        try:
            entry = self._queue.get(timeout=LINGER_S if self._pending else IDLE_S)
        except queue.Empty:
            if self._pending:
                self._commit()
            elif self._log_bytes():
                self._empty_log()
            return True
        entries = [entry]
        with contextlib.suppress(queue.Empty):
            while True:
                entries.append(self._queue.get_nowait())
        for each in entries:
            if each is None:
                self._commit()
                return False
            self._apply(each)
        if any(entry.then for entry in self._pending):
            self._commit()
        return True

    def _apply(self, entry: _Entry) -> None:
        if not self.database.in_transaction:
            self.database.execute("BEGIN IMMEDIATE")
        self._pending.append(entry)
        try:
            self._execute(entry)
        except sqlite3.OperationalError as error:
            if not _disk_full(error):
                raise
            self._wait_for_room(error)

    def _execute(self, entry: _Entry) -> None:
        result = None
        for statement in entry.statements:
            result = statement(self.database)
        if entry.answer is not None:
            entry.answer(result)

    def _commit(self) -> None:
        started_s = time.monotonic()
        fault_point("journal:before-commit")
        try:
            if self.database.in_transaction:
                self.database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if not _disk_full(error):
                raise
            self._wait_for_room(error)
            self._commit()
            return
        fault_point("journal:after-commit")
        self._trouble = None
        self.commits += 1
        self.commit_seconds += time.monotonic() - started_s
        settled, self._pending = self._pending, []
        thens = [entry.then for entry in settled if entry.then]
        if thens:
            self._post(lambda: _call(thens))
        if self._log_bytes() > LONGEST_LOG_BYTES:
            self._empty_log()

    def _wait_for_room(self, error: sqlite3.Error) -> None:
        """Does the open transaction again until the disk takes it."""
        logger.error("the journal's disk is full: nothing is accepted until there is room")
        self._trouble = JournalFull(
            "the disk of the server's state is full; nothing that was accepted is lost, and "
            "accepted calls are answered once there is room: send the call again",
            retry_after_s=RETRY_S,
        )
        while True:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            if self._closing.wait(RETRY_S):  # nothing tells of room
                raise _GivenUp from error
            try:
                self.database.execute("BEGIN IMMEDIATE")
                for entry in self._pending:
                    if entry.answer is None:
                        self._execute(entry)
                return
            except sqlite3.OperationalError as again:
                if not _disk_full(again):
                    raise again from error

    def _fail(self, error: sqlite3.Error) -> None:
        logger.critical("the journal cannot be written: %s; restart the server", error)
        failure = JournalFailed(
            f"the server's journal cannot be written ({error}), so nothing is accepted or "
            "answered; once its disk works, restart the server: it goes on where it was"
        )
        self._trouble = failure
        self._post(lambda: self.on_failure(failure))

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback)

    def _log_bytes(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            return 0

    def _empty_log(self) -> None:
        """Brings the log into the database, so that it starts anew, and gives free pages back."""
        try:
            # `execute` would free one page.
            self.database.executescript(f"PRAGMA incremental_vacuum({MOST_PAGES_FREED})")
            self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.OperationalError as error:
            if not _disk_full(error):
                raise
            logger.warning("the journal's log could not be emptied: %s", error)


def _disk_full(error: sqlite3.Error) -> bool:
    full = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)  # the second: of the log's index
    return getattr(error, "sqlite_errorcode", None) in full


def _settle(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _call(callbacks: Sequence[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()

"""The journal's thread: all that is ready goes to disk in one transaction, with one fsync.

Writes take effect in their order, and their futures are done once they are on disk. What nobody
waits for soon stays in the open transaction for a moment and goes with the next that somebody does.

The journal is crash-only. A write that is bad by itself is left out and its future alone says so;
whatever else goes wrong ends the journal for good: all futures raise it, and so does each write
from then on.
"""

import asyncio
import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mint_core.errors import MintError, ResourceExhausted, Unavailable
from mint_core.fault_points import fault_point
from trainer_service.journal.reserve import Reserve
from trainer_service.journal.schema import lock_folder, open_database

logger = logging.getLogger(__name__)

LINGER_S = 0.1  # how long a write waits that nobody waits for soon
RETRY_S = 1.0  # after a full disk
IDLE_S = 0.2  # without a write, after which the log is brought into the database
MOST_PAGES_FREED = 2000  # at a time
# How long the thread does not hear of a write that nobody waits for soon: whoever made it has other
# things to do first, and a thread that wakes up at once would take their time.
LATER_S = 0.002

T = TypeVar("T")
Statement = Callable[[sqlite3.Connection], Any]
Written = asyncio.Future[Any]

_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)  # the second: of the log's index
# What of the database's errors is the statement's own doing.
_OWN = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)


class JournalFull(ResourceExhausted):
    """There is no room for another promise."""

    reason = "JOURNAL_FULL"


class JournalFailed(Unavailable):
    """The disk failed: what is in memory may be ahead of it, so nothing more is answered."""

    reason = "JOURNAL_FAILED"


class RecordRefused(MintError):
    """One write could not be: it and nothing else."""


class _GivenUp(Exception):
    """There was no room before the end."""


@dataclass(slots=True, eq=False)
class _Entry:
    statements: Sequence[Statement]
    done: Written
    soon: bool
    read: bool = False  # nothing is changed: the result is told at once, and once
    result: Any = None  # what the last statement has returned

    def execute(self, database: sqlite3.Connection) -> None:
        for statement in self.statements:
            self.result = statement(database)


class Journal:
    """One state folder's database. All methods but `close` belong to one event loop."""

    def __init__(self, folder: Path) -> None:
        """Locks and opens the folder. Raises StateRefused."""
        self._lock = lock_folder(folder)
        self.reserve = Reserve(folder)
        try:
            self.database = open_database(folder)  # before `start`, and after `close`, for anyone
        except BaseException:
            os.close(self._lock)
            raise
        self._later: deque[_Entry] = deque()  # writes of which the thread does not know
        self._hand_over_lock = threading.Lock()
        self._tidy = False  # the log is in the database, and no page is free
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="journal")
        self._taken: deque[_Entry | None] = deque()  # out of the queue, and not yet executed
        self._pending: list[_Entry] = []  # of the transaction
        self._full: JournalFull | None = None
        self.failure: JournalFailed | None = None  # why no write will come to disk any more
        self._has_failed = asyncio.Event()
        self._closing = threading.Event()
        self.commits = 0
        self.commit_seconds = 0.0

    def start(self) -> None:
        """Starts the thread; futures are done on the loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Blocks until all that was written is on disk; on a full disk the rest is given up."""
        self._closing.set()
        self._hand_over()
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self.database.close()
        os.close(self._lock)

    def trouble(self) -> MintError | None:
        """Why nothing may be accepted now, if so."""
        return self.failure or self._full

    async def failed(self) -> JournalFailed:
        """Waits until no write will come to disk any more, and says why."""
        await self._has_failed.wait()
        assert self.failure is not None
        return self.failure

    def write(self, *statements: Statement, soon: bool = True) -> Written:
        """Has statements take effect together; they may be run again, after a full disk or beside a
        bad write. Without `soon` it may take a moment.
        """
        return self._put(statements, soon=soon)

    async def flush(self) -> None:
        """Waits until all that was written before is on disk. Raises JournalFailed."""
        await self._put(())

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Runs a query behind all that was written before it. Raises JournalFailed."""
        result: T = await self._put((query,), read=True)
        return result

    def _put(
        self, statements: Sequence[Statement], *, soon: bool = True, read: bool = False
    ) -> Written:
        loop = asyncio.get_running_loop()
        done: Written = loop.create_future()
        if self.failure is not None:
            _fail(done, self.failure)
            return done
        self._later.append(_Entry(statements, done, soon, read))
        if soon:
            self._hand_over()
        elif len(self._later) == 1:
            loop.call_later(LATER_S, self._hand_over)
        return done

    def _hand_over(self) -> None:
        with self._hand_over_lock:  # the end of the service comes from another thread
            while self._later:
                self._queue.put(self._later.popleft())

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except _GivenUp:
            logger.error("the journal ends on a full disk: what is not on it was never answered")
        except BaseException as error:  # whatever it is: nobody else would see it
            logger.critical("the journal has failed; restart the server", exc_info=error)
            self._end(
                JournalFailed(
                    f"the server's journal cannot be written ({error}), so nothing is accepted or "
                    "answered; once its disk works, restart the server: it goes on where it was"
                )
            )

    def _turn(self) -> bool:
        """Takes what is ready and writes it. Returns whether there is more to come."""
        try:
            entry = self._queue.get(timeout=LINGER_S if self._pending else IDLE_S)
        except queue.Empty:
            if self._pending:
                self._commit()
            elif not self._tidy:
                self._tidy_up()
            return True
        self._taken.append(entry)
        self._take_all()
        while self._taken:
            if (entry := self._taken[0]) is None:
                self._commit()
                return False
            self._take(entry)
            self._taken.popleft()
        if any(entry.soon for entry in self._pending):
            self._commit()
        return True

    def _take_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._taken.append(self._queue.get_nowait())

    def _take(self, entry: _Entry) -> None:
        if not entry.read:
            self._pending.append(entry)
        try:
            if not self.database.in_transaction:
                self.database.execute("BEGIN IMMEDIATE")
            entry.execute(self.database)
        except Exception as error:
            if _is_full(error):
                self._wait_for_room(error)
            elif isinstance(error, sqlite3.Error) and not isinstance(error, _OWN):
                raise
            else:  # the fault of what was to be written
                self._leave_out(entry, error)
                return
        if entry.read:
            self._post(_settle, [entry])

    def _leave_out(self, entry: _Entry, error: Exception) -> None:
        """Does the open transaction again without one entry, whose own fault it is."""
        logger.error("a record was refused by the journal", exc_info=error)
        if not entry.read:
            self._pending.remove(entry)
        refused = RecordRefused(f"what was to be noted is refused by the journal: {error}")
        self._post(_fail, entry.done, refused)
        try:
            self._again()
        except sqlite3.OperationalError as again:
            if not _is_full(again):
                raise
            self._wait_for_room(again)

    def _again(self) -> None:
        """Does the open transaction from its beginning."""
        if self.database.in_transaction:
            self.database.execute("ROLLBACK")
        self.database.execute("BEGIN IMMEDIATE")
        for entry in self._pending:
            entry.execute(self.database)

    def _commit(self) -> None:
        started_s = time.monotonic()
        fault_point("journal:before-commit")
        try:
            if self.database.in_transaction:
                self.database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if not _is_full(error):
                raise
            self._wait_for_room(error)
            self._commit()
            return
        fault_point("journal:after-commit")
        self._full = None
        self._tidy = False
        self.commits += 1
        self.commit_seconds += time.monotonic() - started_s
        written, self._pending = self._pending, []
        self._post(_settle, written)

    def _wait_for_room(self, error: Exception) -> None:
        """Does the open transaction again until the disk takes it."""
        logger.error("the journal's disk is full: nothing is accepted until there is room")
        self._full = JournalFull(
            "the disk of the server's state is full; nothing that was accepted is lost, and "
            "accepted calls are answered once there is room: send the call again",
            retry_after_s=RETRY_S,
        )
        at_once = self.reserve.release()
        while True:
            if not at_once and self._closing.wait(RETRY_S):  # nothing tells of room
                raise _GivenUp from error
            try:
                self._again()
                return
            except sqlite3.OperationalError as again:
                if not _is_full(again):
                    raise again from error
            at_once = False

    def _end(self, failure: JournalFailed) -> None:
        self.failure = failure  # from now on nothing is put into the queue

        def tell() -> None:
            self._has_failed.set()
            self._hand_over()
            self._take_all()
            for entry in [*self._pending, *self._taken]:
                if entry is not None:
                    _fail(entry.done, failure)

        self._post(tell)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, *args)

    def _tidy_up(self) -> None:
        """Gives free pages back and brings the log into the database, so that it starts anew."""
        try:
            # `execute` would free one page.
            self.database.executescript(f"PRAGMA incremental_vacuum({MOST_PAGES_FREED})")
            self.database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            ((free_pages,),) = self.database.execute("PRAGMA freelist_count").fetchall()
            self._tidy = free_pages == 0
            self.reserve.hold()
        except sqlite3.OperationalError as error:
            if not _is_full(error):
                raise
            logger.warning("the journal's log could not be emptied: %s", error)


def _is_full(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", None) in _FULL


def _settle(entries: Sequence[_Entry]) -> None:
    for entry in entries:
        if not entry.done.done():
            entry.done.set_result(entry.result)


def _fail(future: Written, error: MintError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # retrieved: nobody need wait for it

"""When the rows of runs are written to disk, so that little has to be computed again after a crash.

A run's loop has the engine copy its row when it is at rest, between two of its calls; the copy is
written in the background. One row is written at a time, and no run waits for another's rest: of
those whose rows are wanted, whoever comes to rest while nothing is written is next.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from mint_core.errors import EngineDied, MintError
from mint_core.fault_points import fault_point
from mint_core.hosting.tasks import Tasks
from mint_core.rpc.metrics import Metrics
from trainer_service.errors import RowNotSaved
from trainer_service.groups.group import Group
from trainer_service.jobs import SavedRow, SaveRow
from trainer_service.run.run import Run, UnsavedWork

logger = logging.getLogger(__name__)

LONGEST_BACKLOG_BYTES = 64 * 1024 * 1024  # of backwards without a step
LONGEST_BACKLOG = 4.0  # of them, in intervals of computing
RETRY_S = 60.0  # after a row that could not be written
LOOKS = 4  # for idle runs, in an interval


class SavedRows:
    """Of all runs. All methods belong to one event loop."""

    def __init__(
        self,
        folder: Path,
        tasks: Tasks,
        *,
        interval_s: float,  # of a run's computing between two saved rows; of idleness before one
        metrics: Metrics,
    ) -> None:
        self._folder = folder
        self._tasks = tasks
        self._interval_s = interval_s
        self._wanted: dict[Run, asyncio.Future[None]] = {}  # the first to be wanted first
        self._writing: Run | None = None
        self._written = asyncio.Event()  # what was being written is
        self._not_before_s = 0.0
        self._files: dict[str, str] = {}  # the newest of each run
        self._count = metrics.counter("mint_snapshots", "Rows written to the state folder")
        self._bytes = metrics.counter("mint_snapshot_bytes", "Bytes of rows written")

    def keep(self, files: dict[str, str]) -> None:
        """Removes what a crash has left beside the newest file of each run."""
        self._files = files
        for path in self._folder.iterdir():
            if path.name not in files.values():
                logger.info("removing %s, which no run needs", path.name)
                path.unlink(missing_ok=True)

    def consider(self, run: Run, *, stepped: bool) -> None:
        """Wants the row of a run saved, a call of which has changed it, if it is time."""
        work = run.unsaved
        if (
            (stepped and work.seconds >= self._interval_s)
            or work.backlog_bytes >= LONGEST_BACKLOG_BYTES
            or work.seconds >= LONGEST_BACKLOG * self._interval_s
        ):
            self.want(run)

    def want(self, run: Run) -> asyncio.Future[None]:
        """Has a row saved as soon as that may be. Done when it has been tried."""
        done = self._wanted.get(run)
        if done is None:
            done = self._wanted[run] = asyncio.get_running_loop().create_future()
            run.inbox.stir()
        return done

    def may_save(self, run: Run, *, at_rest: bool) -> bool:
        """Whether a run's row should be saved before its next call. Whose row is wanted for longest
        comes to rest for that.
        """
        if self._writing or run not in self._wanted:
            return False
        if not self._worth_it(run):
            self._wanted.pop(run).set_result(None)
            return False
        return at_rest or next(iter(self._wanted)) is run

    async def save(self, run: Run) -> None:
        """Begins to save the row of a run that is at rest. Returns when it may change again."""
        done = self._wanted.pop(run)
        self._writing = run
        self._written.clear()
        copied = asyncio.Event()
        self._tasks.start(self._save(run, copied, done), f"saving of {run.id}")
        await copied.wait()

    async def cover_idle(self, runs: Callable[[], Iterable[Run]]) -> None:
        """Has the rows of idle runs saved, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s / LOOKS)
            for run in list(runs()):
                idle_s = time.monotonic() - run.unsaved.changed_s
                if idle_s >= self._interval_s and self._worth_it(run):
                    await self.want(run)

    async def cover(self, runs: Iterable[Run]) -> None:
        """Has every row saved that lacks something on disk."""
        for want in [self.want(run) for run in runs if self._worth_it(run)]:
            await want

    async def leave(self, run: Run) -> None:
        """Has the row of a run that is at rest on disk, so that another engine can go on with it.
        Raises RowNotSaved, and EngineDied.
        """
        while self._writing is run:
            await self._written.wait()
        if not run.unsaved.calls:
            return
        job = SaveRow(training_run_id=run.id, sequence=run.ended, optional=True)
        row = await run.group.scheduler.row(job, run.row_life)
        if run.closing:
            self._remove(row.file)
            return
        await run.journal.saved(row)
        self.replaced(run, row)
        run.unsaved = UnsavedWork()

    async def take(self, group: Group, training_run_id: str, sequence: int, life: int) -> SavedRow:
        """Writes the row as it is behind a call under way, and waits until it is on disk, and on a
        full one for room. What it is worth is for the caller to note.
        """
        while True:
            try:
                job = SaveRow(training_run_id=training_run_id, sequence=sequence, optional=False)
                row: SavedRow = await group.scheduler.row(job, life)
                return row
            except RowNotSaved as failure:
                if failure.retry_after_s is None:
                    raise
                logger.warning("run=%s waits for room on the state's disk", training_run_id)
                await asyncio.sleep(failure.retry_after_s)

    def replaced(self, run: Run, row: SavedRow) -> None:
        """Removes a run's earlier file: the journal names this one."""
        earlier = self._files.get(run.id)
        self._files[run.id] = row.file
        if earlier not in (None, row.file):
            self._remove(earlier or "")
        self._count.inc()
        self._bytes.inc(row.size_bytes)

    def forget(self, run: Run) -> None:
        """Removes the file of a run that is gone."""
        if file := self._files.pop(run.id, None):
            self._remove(file)

    async def _save(self, run: Run, copied: asyncio.Event, done: asyncio.Future[None]) -> None:
        """Saves a row; without it the journal is kept."""
        covered, run.unsaved = run.unsaved, UnsavedWork()
        try:
            job = SaveRow(training_run_id=run.id, sequence=run.ended, optional=True)
            row = await run.group.scheduler.row(
                job, run.row_life, on_part=lambda part: copied.set()
            )
            fault_point("snapshot:before-journal")
            if run.closing:
                self._remove(row.file)
            else:
                await run.journal.saved(row)
                self.replaced(run, row)
        except MintError as error:
            logger.warning("run=%s has no new saved row: %s", run.id, error.message)
            run.unsaved.add(covered)
            if not isinstance(error, EngineDied):
                self._not_before_s = time.monotonic() + RETRY_S
        finally:
            self._writing = None
            self._written.set()
            copied.set()
            done.set_result(None)
            if self._wanted:
                next(iter(self._wanted)).inbox.stir()

    def _worth_it(self, run: Run) -> bool:
        waiting = time.monotonic() < self._not_before_s
        return bool(run.unsaved.calls) and run.has_row and not run.closing and not waiting

    def _remove(self, file: str) -> None:
        path = self._folder / file  # perhaps large: to remove it takes a while
        self._tasks.start(asyncio.to_thread(path.unlink, missing_ok=True), f"removal of {file}")

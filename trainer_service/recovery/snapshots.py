"""When the rows of runs are written to disk, so that little has to be computed again after a crash.

The engine copies a row and writes the copy in the background; calls wait for the copy alone.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from mint_core.errors import EngineDied, MintError
from mint_core.fault_points import fault_point
from mint_core.rpc.metrics import Metrics
from trainer_service.errors import SnapshotFailed
from trainer_service.jobs import SnapshotRow, SnapshotWritten
from trainer_service.journal.ledger import Ledger
from trainer_service.journal.records import SnapshotRecord
from trainer_service.queue.scheduler import Scheduler
from trainer_service.run.exposure import Exposure
from trainer_service.run.run import Run

logger = logging.getLogger(__name__)

LONGEST_BACKLOG_BYTES = 64 * 1024 * 1024  # of backwards without a step
LONGEST_BACKLOG = 4.0  # of them, in intervals of computing
RETRY_S = 60.0  # after a snapshot that could not be written
LOOKS = 4  # for idle runs, in an interval


class Snapshots:
    """Of the rows of all runs. One is written at a time. All methods belong to one event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        ledger: Ledger,
        folder: Path,
        *,
        interval_s: float,  # of a run's computing between two snapshots; of idleness before one
        metrics: Metrics,
    ) -> None:
        self._scheduler = scheduler
        self._ledger = ledger
        self._folder = folder
        self._interval_s = interval_s
        self._one = asyncio.Lock()
        self._not_before_s = 0.0
        self._files: dict[str, str] = {}  # the newest of each run
        self._tasks: set[asyncio.Task[Any]] = set()
        self._count = metrics.counter("mint_snapshots", "Rows written to the state folder")
        self._bytes = metrics.counter("mint_snapshot_bytes", "Bytes of rows written")

    def keep(self, files: dict[str, str]) -> None:
        """Removes what a crash has left beside the newest file of each run."""
        self._files = files
        for path in self._folder.iterdir():
            if path.name not in files.values():
                logger.info("removing %s, which no run needs", path.name)
                path.unlink(missing_ok=True)

    async def after(self, run: Run, *, stepped: bool) -> None:
        """Has the row written if it is time. The call that has changed it still has its turn."""
        if self._one.locked() or time.monotonic() < self._not_before_s:
            return
        exposure = run.exposure
        if stepped and exposure.seconds >= self._interval_s:
            await self._one.acquire()
            self._spawn(self._finish(run, exposure, await self._copy(run)))
        elif (
            exposure.backlog_bytes >= LONGEST_BACKLOG_BYTES
            or exposure.seconds >= LONGEST_BACKLOG * self._interval_s
        ):
            self._spawn(self.cover(run))  # when backwards beside this one have ended too

    async def take(self, run: Run, sequence: int) -> SnapshotRecord:
        """Writes the row as it is behind a call that has its turn, and waits until it is on disk,
        and on a full one for room. What it is worth is for the caller to note.
        """
        while True:
            try:
                return await (await self._copy(run, sequence, optional=False))
            except SnapshotFailed as failure:
                if failure.retry_after_s is None:
                    raise
                logger.warning("run=%s waits for room on the state's disk", run.id)
                await asyncio.sleep(failure.retry_after_s)

    def replaced(self, run: Run, snapshot: SnapshotRecord) -> None:
        """Removes a run's earlier file: the journal names this one."""
        earlier = self._files.get(run.id)
        self._files[run.id] = snapshot.file
        if earlier not in (None, snapshot.file):
            self._remove(earlier or "")
        self._count.inc()
        self._bytes.inc(snapshot.size_bytes)

    def forget(self, run: Run) -> None:
        """Removes the file of a run that is gone."""
        if file := self._files.pop(run.id, None):
            self._remove(file)

    async def cover(self, run: Run) -> None:
        """Has a row written once the run's calls under way have ended, and waits until it is."""
        async with self._one:
            async with run.turns.take(exclusive=True):
                if not self._worth_it(run):
                    return
                exposure = run.exposure
                writing = await self._copy(run)
            await self._settle(run, exposure, writing)

    async def cover_idle(self, runs: Callable[[], Iterable[Run]]) -> None:
        """Has the rows of idle runs written, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s / LOOKS)
            for run in list(runs()):
                idle_s = time.monotonic() - run.exposure.changed_s
                if idle_s >= self._interval_s and self._worth_it(run):
                    await self.cover(run)

    async def cover_all(self, runs: Iterable[Run]) -> None:
        """Has every row written that lacks something on disk."""
        for run in runs:
            if self._worth_it(run):
                await self.cover(run)

    async def stop(self) -> None:
        """Ends what is under way; a file half written is removed at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _worth_it(self, run: Run) -> bool:
        present = run.presence.life == self._scheduler.life
        waiting = time.monotonic() < self._not_before_s
        return bool(run.exposure.calls) and present and not run.deleted and not waiting

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _copy(
        self, run: Run, sequence: int | None = None, *, optional: bool = True
    ) -> "asyncio.Task[SnapshotRecord]":
        """Returns as soon as the row may change again."""
        run.exposure = Exposure()
        copied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        job = self._job(run, sequence or run.ended, optional=optional)
        writing = asyncio.create_task(self._write(run, job, copied))
        self._tasks.add(writing)
        writing.add_done_callback(self._tasks.discard)
        either: set[asyncio.Future[Any]] = {copied, writing}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return writing

    def _job(self, run: Run, sequence: int, *, optional: bool) -> SnapshotRow:
        path = self._folder / f"{run.id}-{sequence}.safetensors"
        return SnapshotRow(
            training_run_id=run.id, sequence=sequence, path=str(path), optional=optional
        )

    async def _write(
        self, run: Run, job: SnapshotRow, copied: "asyncio.Future[None]"
    ) -> SnapshotRecord:
        written: SnapshotWritten = await self._scheduler.row(
            job, run.presence.life, on_part=lambda part: copied.set_result(None)
        )
        return SnapshotRecord(job.sequence, Path(job.path).name, written.size_bytes)

    async def _finish(
        self, run: Run, exposure: Exposure, writing: "asyncio.Task[SnapshotRecord]"
    ) -> None:
        try:
            await self._settle(run, exposure, writing)
        finally:
            self._one.release()

    async def _settle(
        self, run: Run, exposure: Exposure, writing: "asyncio.Task[SnapshotRecord]"
    ) -> None:
        """Notes a snapshot once it is on disk; without it the journal is kept."""
        try:
            snapshot = await writing
        except MintError as error:
            logger.warning("run=%s has no new snapshot: %s", run.id, error.message)
            run.exposure.add(exposure)
            if not isinstance(error, EngineDied):
                self._not_before_s = time.monotonic() + RETRY_S
            return
        fault_point("snapshot:before-journal")
        if run.deleted:
            self._remove(snapshot.file)
        else:
            self._ledger.covered(run, snapshot, then=lambda: self.replaced(run, snapshot))

    def _remove(self, file: str) -> None:
        path = self._folder / file  # perhaps large: to remove it takes a while
        asyncio.get_running_loop().run_in_executor(None, lambda: path.unlink(missing_ok=True))

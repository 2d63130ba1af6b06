"""The state folder and what stands on it: journal, snapshots, recovery, and its size."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from mint_core.errors import MintError, ResourceExhausted
from mint_core.rpc.metrics import Metrics
from trainer_service.journal.ledger import Ledger
from trainer_service.journal.schema import SNAPSHOTS
from trainer_service.journal.writer import Journal
from trainer_service.queue.scheduler import Scheduler
from trainer_service.recovery.recovery import Recovery
from trainer_service.recovery.snapshots import Snapshots
from trainer_service.run.run import Run

logger = logging.getLogger(__name__)

MEASURE_INTERVAL_S = 5.0
WARNING_SHARE = 0.8  # of the quota
RETRY_S = 10.0


class StateQuotaExceeded(ResourceExhausted):
    """The state folder is as large as it may be."""

    reason = "STATE_QUOTA_EXCEEDED"


class StateSize:
    """How large the state folder is, and whether it may grow."""

    def __init__(self, folder: Path, quota_bytes: int, metrics: Metrics) -> None:
        self._folder = folder
        self._quota_bytes = quota_bytes  # 0: none
        self._warned = False
        self.size_bytes = _size_bytes(folder)
        metrics.gauge("mint_state_bytes", "Size of the state folder", lambda: self.size_bytes)
        metrics.gauge(
            "mint_state_quota_bytes", "What it may have; 0: no quota", lambda: quota_bytes
        )

    def refusal(self) -> MintError | None:
        """Why nothing may be accepted now, if so."""
        if not self._quota_bytes or self.size_bytes < self._quota_bytes:
            return None
        return StateQuotaExceeded(
            f"the server's state takes {self.size_bytes >> 20} MiB, and `state_quota_gib` allows "
            f"{self._quota_bytes >> 20}; delete training runs, or wait until their snapshots "
            "replace what is journalled: send the call again",
            retry_after_s=RETRY_S,
            size_bytes=self.size_bytes,
            quota_bytes=self._quota_bytes,
        )

    async def keep_measured(self) -> None:
        """Measures now and then, until cancelled."""
        while True:
            self.size_bytes = await asyncio.to_thread(_size_bytes, self._folder)
            self._warn()
            await asyncio.sleep(MEASURE_INTERVAL_S)

    def _warn(self) -> None:
        near = bool(self._quota_bytes) and self.size_bytes > WARNING_SHARE * self._quota_bytes
        if near and not self._warned:
            logger.warning(
                "the state takes %d MiB of the %d that `state_quota_gib` allows; at that nothing "
                "more is accepted",
                self.size_bytes >> 20,
                self._quota_bytes >> 20,
            )
        self._warned = near


class Durability:
    """All methods but `close` belong to one event loop."""

    def __init__(
        self,
        folder: Path,
        scheduler: Scheduler,
        metrics: Metrics,
        *,
        snapshot_s: float,
        quota_bytes: int = 0,
    ) -> None:
        """Locks and opens the folder. Raises StateRefused."""
        self.journal = Journal(folder)
        rows = (folder / SNAPSHOTS).absolute()
        self.size = StateSize(folder, quota_bytes, metrics)
        self.ledger = Ledger(self.journal)
        self.recovery = Recovery(scheduler, self.ledger, rows, metrics)
        self.snapshots = Snapshots(
            scheduler, self.ledger, rows, interval_s=snapshot_s, metrics=metrics
        )
        self._tasks: list[asyncio.Task[None]] = []
        metrics.gauge(
            "mint_journal_commits", "Transactions on disk", lambda: float(self.journal.commits)
        )
        metrics.gauge(
            "mint_journal_commit_seconds",
            "Time that they have taken in all",
            lambda: self.journal.commit_seconds,
        )

    def refusal(self) -> MintError | None:
        """Why nothing new may be accepted, if so."""
        return self.journal.trouble() or self.size.refusal()

    def start(self, runs: Callable[[], Iterable[Run]]) -> None:
        """Begins to write."""
        self.journal.start()
        self._keep(self.size.keep_measured())
        self._keep(self.snapshots.cover_idle(runs))

    async def stop(self) -> None:
        """Ends what is under way and brings to disk what was noted."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.recovery.stop()
        await self.snapshots.stop()
        await asyncio.to_thread(self.journal.close)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))


def _size_bytes(folder: Path) -> int:
    """Of all files in a folder, some of which may just go."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total

"""How large the state folder is, and whether it may grow."""

import asyncio
import logging
from pathlib import Path

from mint_core.errors import MintError, ResourceExhausted
from mint_core.rpc.metrics import Metrics
from trainer_service.journal.reserve import Reserve
from trainer_service.journal.writer import JournalFull

logger = logging.getLogger(__name__)

MEASURE_INTERVAL_S = 5.0
WARNING_SHARE = 0.8  # of the quota
RETRY_S = 10.0


class StateQuotaExceeded(ResourceExhausted):
    """The state folder is as large as it may be."""

    reason = "STATE_QUOTA_EXCEEDED"


class StateSize:
    """Measured now and then."""

    def __init__(self, folder: Path, quota_bytes: int, reserve: Reserve, metrics: Metrics) -> None:
        self._folder = folder
        self._reserve = reserve
        self._quota_bytes = quota_bytes  # 0: none
        self._warned = False
        self.size_bytes = _size_bytes(folder)
        metrics.gauge("mint_state_bytes", "Size of the state folder", lambda: self.size_bytes)
        metrics.gauge(
            "mint_state_quota_bytes", "What it may have; 0: no quota", lambda: quota_bytes
        )

    def refusal(self) -> MintError | None:
        """Why nothing may be accepted now, if so."""
        if self._reserve.low:
            return JournalFull(
                "the disk of the server's state is nearly full, and what is left of it is for "
                "calls under way; delete training runs, and send the call again",
                retry_after_s=RETRY_S,
            )
        if not self._quota_bytes or self.size_bytes < self._quota_bytes:
            return None
        return StateQuotaExceeded(
            f"the server's state takes {self.size_bytes >> 20} MiB, and `state_quota_gib` allows "
            f"{self._quota_bytes >> 20}; delete training runs, or wait until their saved rows "
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


def _size_bytes(folder: Path) -> int:
    """Of all files in a folder, some of which may just go."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total

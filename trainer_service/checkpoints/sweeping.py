"""When the store is swept: once an hour, and as soon as the time of a checkpoint is over."""

import asyncio
import logging
import time
from contextlib import suppress
from datetime import UTC, datetime

from checkpoint_store import CheckpointStore
from mint_core.errors import MintError

logger = logging.getLogger(__name__)

INTERVAL_S = 3600.0
LEAST_INTERVAL_S = 1.0
_MOST_SHARE = 0.05  # of the time, for sweeps of a store that is large


class Sweeper:
    """All methods belong to one event loop."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._next_expiry: datetime | None = None  # None: none is known of
        self._sooner = asyncio.Event()

    def note_expiry(self, expiry: datetime | None) -> None:
        """Takes note of when a checkpoint is to go, if it ever is."""
        if expiry is not None and (self._next_expiry is None or expiry < self._next_expiry):
            self._next_expiry = expiry
            self._sooner.set()

    async def run(self) -> None:
        """Removes what has expired, until cancelled."""
        while True:
            started_s = time.monotonic()
            self._next_expiry = None
            try:
                swept = await asyncio.to_thread(self._store.sweep)
                logger.info("store swept revisions_removed=%d", swept.removed)
                self.note_expiry(swept.next_expiry)
            except (OSError, MintError):
                logger.exception("the store could not be swept")
            await self._wait(time.monotonic() - started_s)

    async def _wait(self, sweep_s: float) -> None:
        await asyncio.sleep(max(LEAST_INTERVAL_S, sweep_s / _MOST_SHARE))
        ends_s = time.monotonic() + INTERVAL_S
        while (left_s := min(ends_s - time.monotonic(), self._until_expiry_s())) > 0:
            self._sooner.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._sooner.wait()

    def _until_expiry_s(self) -> float:
        if self._next_expiry is None:
            return INTERVAL_S
        return (self._next_expiry - datetime.now(UTC)).total_seconds()

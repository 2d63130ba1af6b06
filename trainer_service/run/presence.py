"""Whether the engine has a run's row, and the calls that wait for it."""

import asyncio
import copy
from collections.abc import Iterator
from contextlib import contextmanager

from mint_core.errors import MintError

# With what of a replay an engine is busy: what it is, and the number of plan or call.
Doing = tuple[str, int]


class Presence:
    """Of one run's row. `life` is that of the engine that has it; see `Scheduler.life`."""

    def __init__(self) -> None:
        self.life = 0  # no engine's
        self.restoring = False
        self.executing = 0  # calls that have their turn
        self.deaths: dict[Doing, int] = {}  # of engines that restored the row, by with what
        self._parked: dict[int, asyncio.Future[None]] = {}  # by sequence

    @contextmanager
    def execution(self) -> Iterator[None]:
        """Counts a call that works on the row."""
        self.executing += 1
        try:
            yield
        finally:
            self.executing -= 1

    @property
    def parked(self) -> int:
        """Calls that wait for the row."""
        return len(self._parked)

    def parked_before(self, sequence: int) -> bool:
        """Whether an earlier call still waits, or has not gone on yet."""
        return any(parked < sequence for parked in self._parked)

    async def park(self, sequence: int) -> None:
        """Waits until the row is there again. Raises why it cannot be."""
        future = asyncio.get_running_loop().create_future()
        self._parked[sequence] = future
        try:
            await future
        finally:
            del self._parked[sequence]
            if not self.restoring:
                self._wake_next()

    def wake(self, error: MintError | None = None) -> None:
        """Lets the calls go on, each when the one before it has, or fails them all."""
        self.restoring = False
        if error is None:
            self._wake_next()
            return
        for future in self._parked.values():
            if not future.done():
                future.set_exception(copy.copy(error))

    def _wake_next(self) -> None:
        if self._parked:
            future = self._parked[min(self._parked)]
            if not future.done():
                future.set_result(None)

    def leave(self) -> None:
        """Notes that the row is not what it should be, so that it must be restored."""
        self.life = 0

"""What a run has to do: its accepted calls by number, and errands between them."""

import asyncio
import heapq
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from mint_core.errors import MintError
from trainer_service.calls import Call


@dataclass(slots=True, eq=False)
class Errand:
    """What is done alone, between calls. `own`: it is the loop's, and never raises."""

    act: Callable[[], Awaitable[Any]]
    own: bool = False
    done: asyncio.Future[Any] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def finish(self, came: Any) -> None:
        """Tells what it has come to, an exception perhaps."""
        if isinstance(came, Exception):
            self.done.set_exception(came)
            self.done.exception()  # retrieved: who asked may have left
        else:
            self.done.set_result(came)


Work = Call | Errand


class Inbox:
    """Filled from outside, emptied by the run's loop. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._ready: list[tuple[int, int, Work]] = []  # a heap; errands before the call behind them
        self._errands = 0
        self.stirred = asyncio.Event()  # there is something to look at
        self.at_rest = asyncio.Event()  # nothing is under way or to be done

    def put(self, call: Call) -> None:
        heapq.heappush(self._ready, (call.place.sequence, 1, call))
        self.stir()

    async def behind(self, sequence: int, act: Callable[[], Awaitable[Any]]) -> Any:
        """Does something alone, when all calls before a number have an outcome."""
        errand = Errand(act)
        self._errands += 1
        heapq.heappush(self._ready, (sequence, -self._errands, errand))
        self.stir()
        return await errand.done

    def stir(self) -> None:
        """Has the loop look what there is to do."""
        self.stirred.set()
        self.at_rest.clear()

    @property
    def first(self) -> Work | None:
        return self._ready[0][2] if self._ready else None

    @property
    def first_sequence(self) -> float:
        """The number of what is first; infinite if there is nothing."""
        return self._ready[0][0] if self._ready else float("inf")

    def take(self) -> Work:
        """Takes the first out."""
        return heapq.heappop(self._ready)[2]

    def take_calls(self) -> list[Call]:
        """Takes all calls out."""
        calls = [work for _, _, work in sorted(self._ready) if isinstance(work, Call)]
        self._ready = [each for each in self._ready if isinstance(each[2], Errand)]
        heapq.heapify(self._ready)
        return calls

    def abandon(self, error: MintError) -> None:
        """Drops everything."""
        ready, self._ready = self._ready, []
        for _, _, work in ready:
            if isinstance(work, Errand):
                work.finish(error)
        self.stir()

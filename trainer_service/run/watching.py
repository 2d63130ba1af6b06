"""What those who watch a run are told: its state, its place in the queue, how its calls ended.

No polling: what changes a run stirs its watches, and each then looks for itself what is new. A slow
reader costs its last outcomes, and gets the state as it is when it reads.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from mint_core.errors import MintError
from trainer_service.calls import Call, Method, Outcome
from trainer_service.queue.scheduler import Forecast
from trainer_service.run.run import Run
from trainer_service.run_description import RunView

INTERVAL_S = 0.25  # between two looks at state and queue
KEPT_ENDS = 256  # that wait for a slow reader


@dataclass(frozen=True, slots=True)
class QueueProgress:
    """What of a run waits."""

    waiting_calls: int
    forecast: Forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnd:
    """How a sequenced call ended. Small: an outcome's arrays are not kept."""

    sequence: int
    method: Method
    step: int  # of the run, by then
    error: MintError | None
    metrics: Mapping[str, float]
    missed: int = 0  # ends just before this one that were left out


@dataclass(frozen=True, slots=True)
class Event:
    time: datetime
    what: RunView | QueueProgress | CallEnd


class Watch:
    """One watcher of a run. All methods belong to one event loop."""

    def __init__(
        self,
        run: Run,
        view: Callable[[], RunView],
        forecast: Callable[[], Forecast],
        followed: Sequence[set[asyncio.Event]],  # who is there is set when view or forecast change
    ) -> None:
        self._run = run
        self._look = view
        self._forecast = forecast
        self._followed = followed
        self._stirred = asyncio.Event()
        self._ends: deque[Event] = deque(maxlen=KEPT_ENDS)
        self._missed = 0
        self._ended = False
        self._error: MintError | None = None  # why, if not by the end of the run
        self._view: RunView | None = None  # as last told
        self._progress: QueueProgress | None = None
        self._next_look_s = 0.0  # as the event loop's time
        self._timer: asyncio.TimerHandle | None = None

    async def events(self) -> AsyncGenerator[Event, None]:
        """What is new, from now on, until the run is deleted. To be closed by its reader.

        Raises what `end` was told.
        """
        self._run.watchers.add(self)
        for followers in self._followed:
            followers.add(self._stirred)
        self.stir()
        try:
            while self._ends or not self._ended:
                await self._stirred.wait()
                self._stirred.clear()
                while self._ends:
                    yield self._next_end()
                for event in self._news():
                    yield event
            if self._error:
                raise self._error
        finally:
            self._run.watchers.discard(self)
            for followers in self._followed:
                followers.discard(self._stirred)
            if self._timer:
                self._timer.cancel()

    def stir(self) -> None:
        """Something of the run has changed."""
        self._stirred.set()

    def call_ended(self, call: Call, outcome: Outcome) -> None:
        """A call of the run has got its outcome."""
        self._missed += len(self._ends) == KEPT_ENDS
        end = CallEnd(
            sequence=call.place.sequence,
            method=call.method,
            step=self._run.state.step,
            error=outcome.error,
            metrics=outcome.metrics,
        )
        self._ends.append(Event(datetime.now(UTC), end))
        self.stir()

    def end(self, error: MintError | None) -> None:
        """The run is gone, or cannot be watched any more."""
        self._ended, self._error = True, error
        self.stir()

    def _next_end(self) -> Event:
        event = self._ends.popleft()
        assert isinstance(event.what, CallEnd)
        missed, self._missed = self._missed, 0
        return replace(event, what=replace(event.what, missed=missed))

    def _news(self) -> Iterator[Event]:
        """State and queue, where they differ from what was told, and not too often."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._next_look_s:
            if self._timer is None:
                self._timer = loop.call_at(self._next_look_s, self._look_again)
            return
        self._next_look_s = loop.time() + INTERVAL_S
        now = datetime.now(UTC)
        view = self._look()
        if self._view is None or _state(view) != _state(self._view):
            self._view = view
            yield Event(now, view)
        progress = QueueProgress(self._run.numbers.in_flight, self._forecast())
        if progress != self._progress:
            self._progress = progress
            yield Event(now, progress)

    def _look_again(self) -> None:
        self._timer = None
        self.stir()


def _state(view: RunView) -> tuple[str, str, Mapping[str, str], int]:
    return view.lost, view.trouble, view.metadata, view.state.inexact_replays

"""What those who watch a run are told: its state, its place in the queue, how its calls ended.

A run that is watched has a list of events, which each watch reads from its own place. No polling:
what changes a run stirs it, and it then looks for itself what is new. A slow reader costs its last
outcomes, and gets the state as it is when it reads.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from mint_core.errors import MintError
from trainer_service.calls import Call, Method, Outcome
from trainer_service.errors import EventsGone
from trainer_service.queue.scheduler import Forecast
from trainer_service.run.run import Run
from trainer_service.run_description import RunView

INTERVAL_S = 0.25  # between two looks at state and queue
KEPT_ENDS = 256  # how many are held, for a slow reader or one who was cut off
LINGER_S = 30.0  # how long a run's events are held when nobody reads them
STEP = 3  # between numbers: after any event, state and place may be told to one who begins there


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
    place: int  # how many had ended since the run is watched
    missed: int = 0  # ends just before this one that were left out


@dataclass(frozen=True, slots=True)
class Event:
    number: int
    time: datetime
    what: RunView | QueueProgress | CallEnd


class RunEvents:
    """What has happened to a run since its first watch. All methods belong to one event loop."""

    def __init__(
        self,
        run: Run,
        view: Callable[[], RunView],
        forecast: Callable[[], Forecast],
        followed: Sequence[set[Callable[[], None]]],  # who is there is called when these change
    ) -> None:
        self._run = run
        self._view = view
        self._forecast = forecast
        self._followed = followed
        # The clock's, so that no number of an earlier list can be one of this.
        self._number = STEP * int(time.time() * 1e6)
        self._ends: deque[Event] = deque(maxlen=KEPT_ENDS)
        self._ended_calls = 0
        self._gone = self._number  # of the newest event that is held no more
        self._state: Event | None = None  # as last told
        self._progress: Event | None = None
        self._next_look_s = 0.0  # as the event loop's time
        self._timer: asyncio.TimerHandle | None = None  # until then
        self._readers: set[asyncio.Event] = set()  # set when there is news
        loop = asyncio.get_running_loop()
        self._closing = loop.call_later(LINGER_S, self._close)  # unless there are some
        self._over = False
        self._error: MintError | None = None  # why, if not by the end of the run
        run.watched = self
        for followers in followed:
            followers.add(self.stir)

    async def read(self, resume_after: int) -> AsyncGenerator[Event, None]:
        """What comes behind an event; with 0, the run as it is, and what comes from now on. Until
        the run is deleted. To be closed by its reader.

        Raises EventsGone, and what `end` was told.
        """
        news = self._enter()
        try:
            number = self._behind(resume_after)
            ends = self._ended_calls - sum(event.number > number for event in self._ends)
            for event in self._beginning(number, resume_after):
                yield event
            while True:
                news.clear()
                while (oldest := self._next(number, ends)) is not None:
                    number = oldest.number
                    if isinstance(end := oldest.what, CallEnd):
                        oldest = replace(oldest, what=replace(end, missed=end.place - ends - 1))
                        ends = end.place
                    yield oldest
                if self._over:
                    break
                await news.wait()
            if self._error:
                raise self._error
        finally:
            self._leave(news)

    def stir(self) -> None:
        """Something of the run has changed."""
        if self._timer is None and not self._over:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(self._next_look_s, loop.time()), self._look)

    def call_ended(self, call: Call, outcome: Outcome) -> None:
        """A call of the run has got its outcome."""
        if len(self._ends) == KEPT_ENDS:
            self._gone = self._ends[0].number
        self._ended_calls += 1
        end = CallEnd(
            sequence=call.place.sequence,
            method=call.method,
            step=self._run.state.step,
            error=outcome.error,
            metrics=outcome.metrics,
            place=self._ended_calls,
        )
        self._ends.append(self._event(end))
        self.stir()

    def end(self, error: MintError | None) -> None:
        """The run is gone, or cannot be watched any more."""
        self._over, self._error = True, error
        for reader in self._readers:
            reader.set()
        if not self._readers:
            self._close()

    def _behind(self, resume_after: int) -> int:
        """The number of the last event that a reader has, of those that all readers get."""
        number = resume_after - resume_after % STEP
        if not resume_after:
            self._look()
            return self._number
        if not self._gone <= number <= self._number:
            raise EventsGone(resume_after)
        return number

    def _beginning(self, number: int, resume_after: int) -> Sequence[Event]:
        """State and place as they are, for a reader who begins behind that event: told to him
        alone, so that their numbers are between those of events.
        """
        assert self._progress is not None
        told = resume_after - number if resume_after else 0
        if self._progress.number > number or (resume_after and not told):
            return ()  # what is new is told to all
        now = datetime.now(UTC)
        both = (Event(number + 1, now, self._view()), Event(number + 2, now, self._progress.what))
        return both[told:]

    def _next(self, number: int, ends: int) -> Event | None:
        """The oldest that is held and comes behind that number, or those ends."""
        held = [event for event in (self._state, self._progress) if event and event.number > number]
        if ends < self._ended_calls:
            oldest = self._ended_calls - len(self._ends)
            held.append(self._ends[max(ends - oldest, 0)])
        return min(held, key=lambda event: event.number, default=None)

    def _look(self) -> None:
        """Tells state and queue where they differ from what was told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next_look_s = asyncio.get_running_loop().time() + INTERVAL_S
        view = self._view()
        if self._state is None or _state(view) != _state(self._state.what):
            self._state = self._event(view)
        progress = QueueProgress(self._run.numbers.in_flight, self._forecast())
        if self._progress is None or progress != self._progress.what:
            self._progress = self._event(progress)

    def _event(self, what: RunView | QueueProgress | CallEnd) -> Event:
        self._number += STEP
        for reader in self._readers:
            reader.set()
        return Event(self._number, datetime.now(UTC), what)

    def _enter(self) -> asyncio.Event:
        self._closing.cancel()
        self._readers.add(news := asyncio.Event())
        return news

    def _leave(self, news: asyncio.Event) -> None:
        self._readers.discard(news)
        if self._over and not self._readers:
            self._close()
        elif not self._readers:
            self._closing = asyncio.get_running_loop().call_later(LINGER_S, self._close)

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for followers in self._followed:
            followers.discard(self.stir)
        self._run.watched = None


def _state(view: object) -> tuple[str, str, Mapping[str, str], int, str]:
    assert isinstance(view, RunView)
    return view.lost, view.trouble, view.metadata, view.state.inexact_replays, view.group

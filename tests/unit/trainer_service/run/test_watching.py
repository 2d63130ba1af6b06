"""What watchers of a run are told, on a front whose engine has no model."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from mint_core.errors import TrainingRunNotFound, Unavailable
from tests.unit.trainer_service.calls import call
from tests.unit.trainer_service.fronts import TENANT, Front, backward, fronting, optim_step
from trainer_service.errors import EventsGone
from trainer_service.queue.scheduler import FIRST_PREDICTION_S
from trainer_service.run import watching
from trainer_service.run.watching import KEPT_ENDS, CallEnd, Event, QueueProgress
from trainer_service.run_description import RunView
from trainer_service.wire.requests import UpdateRun


class Reader:
    """Reads a watch to its end in a task of its own."""

    def __init__(self) -> None:
        self.told: list[RunView | QueueProgress | CallEnd] = []
        self._news = asyncio.Event()

    async def read(self, events: AsyncIterator[Event]) -> None:
        async for event in events:
            self.told.append(event.what)
            self._news.set()

    async def until(self, last: RunView | QueueProgress | CallEnd | type) -> None:
        """Waits until something like `last` has been told after all that was before."""
        while not (self.told and (self.told[-1] == last or type(self.told[-1]) is last)):
            self._news.clear()
            await self._news.wait()

    @property
    def ends(self) -> list[CallEnd]:
        return [what for what in self.told if isinstance(what, CallEnd)]

    @property
    def views(self) -> list[RunView]:
        return [what for what in self.told if isinstance(what, RunView)]

    @property
    def waiting(self) -> list[int]:
        return [what.waiting_calls for what in self.told if isinstance(what, QueueProgress)]


@asynccontextmanager
async def reading(front: Front, run: str) -> AsyncIterator[Reader]:
    reader = Reader()
    async with aclosing(front.runs.watch(TENANT, run)) as events:
        task = asyncio.create_task(reader.read(events))
        await reader.until(QueueProgress)
        try:
            yield reader
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_the_state_comes_first_and_then_every_call_with_its_metrics(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        async with reading(front, run) as reader:
            assert [type(what) for what in reader.told] == [RunView, QueueProgress]
            assert reader.views[0].origin.training_run_id == run

            await front.submit(backward(run, 1, [8]))
            await front.submit(optim_step(run, 2))
            await asyncio.gather(front.submit(optim_step(run, 3)), return_exceptions=True)
            while len(reader.ends) < 3:
                await asyncio.sleep(0)

    computed, stepped, refused = reader.ends
    assert (computed.sequence, computed.method, computed.step) == (1, "ForwardBackward", 0)
    assert computed.metrics == {"plan:sum": 1, "coming:sum": 0}
    assert (stepped.sequence, stepped.method, stepped.step) == (2, "OptimStep", 1)
    assert stepped.metrics["grad_norm:mean"] == 2
    assert refused.error is not None
    assert (refused.error.reason, refused.metrics) == ("NO_GRADIENT", {})


async def test_the_place_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "INTERVAL_S", 0.0)
    async with fronting(tmp_path) as front:
        flooding, run = [await front.create() for _ in range(2)]
        await front.submit(backward(flooding, 1, [8]))
        # The rate is known from the end of that plan, which comes behind the answer.
        while front.scheduler.predict_s(TENANT, flooding, 0) == FIRST_PREDICTION_S:
            await asyncio.sleep(0)
        async with reading(front, run) as reader:
            flood = front.submit(backward(flooding, 2, [30] * 4))
            done = front.submit(backward(run, 1, [30] * 2))
            await asyncio.gather(flood, done)
            idle = reader.told[1]
            await reader.until(idle)

    assert isinstance(idle, QueueProgress)
    assert (idle.waiting_calls, idle.forecast.tokens_ahead, idle.forecast.wait_s) == (0, 0, 0.0)
    waits = [what for what in reader.told if isinstance(what, QueueProgress)][1:-1]
    assert {wait.waiting_calls for wait in waits} == {1}
    first = waits[0].forecast
    assert first.tokens_ahead > 0
    assert first.wait_s is not None
    assert first.wait_s > 0


async def test_many_changes_are_told_as_one(tmp_path: Path) -> None:
    """State and queue at most so often, and then as they are."""
    async with fronting(tmp_path) as front:
        run = await front.create()
        async with reading(front, run) as reader:
            started_s = time.monotonic()
            for sequence in range(1, 31):
                await front.submit(call(sequence, run=run, method="DiscardGradient"))
                await front.runs.update(
                    TENANT,
                    UpdateRun(
                        training_run_id=run,
                        identity=front.identity(),
                        metadata={"n": str(sequence)},
                    ),
                )
            while dict(reader.views[-1].metadata) != {"n": "30"}:
                await asyncio.sleep(0.01)
            intervals = (time.monotonic() - started_s) / watching.INTERVAL_S

    assert len(reader.views) <= 2 + intervals
    assert len(reader.ends) == 30


async def test_a_slow_reader_is_told_what_it_missed_and_costs_no_more(tmp_path: Path) -> None:
    count = KEPT_ENDS + 50
    async with fronting(tmp_path) as front:
        run = await front.create()
        async with aclosing(front.runs.watch(TENANT, run)) as events:
            assert isinstance((await anext(events)).what, RunView)  # and reads no more for now
            for sequence in range(1, count + 1):
                await front.submit(
                    call(sequence, run=run, acknowledged=sequence - 1, method="DiscardGradient")
                )
            ends: list[CallEnd] = []
            while len(ends) < KEPT_ENDS:
                what = (await anext(events)).what
                ends += [what] if isinstance(what, CallEnd) else []

    assert [end.sequence for end in ends] == list(range(51, count + 1))
    assert [end.missed for end in ends] == [50] + [0] * (KEPT_ENDS - 1)


async def test_a_watch_ends_when_the_run_is_deleted(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run, other = [await front.create() for _ in range(2)]
        readers = [Reader() for _ in range(3)]
        reads = [
            asyncio.create_task(reader.read(front.runs.watch(TENANT, name)))
            for reader, name in zip(readers, (run, run, other), strict=True)
        ]
        await asyncio.gather(*(reader.until(QueueProgress) for reader in readers))
        await front.submit(call(1, run=run, method="DiscardGradient"))
        await front.delete(run)

        await asyncio.gather(*reads[:2])  # they end by themselves
        assert not reads[2].done()
        reads[2].cancel()
        await asyncio.gather(reads[2], return_exceptions=True)
        with pytest.raises(TrainingRunNotFound):
            front.runs.watch(TENANT, run)

    assert [reader.ends[-1].sequence for reader in readers[:2]] == [1, 1]


async def test_many_watchers_are_all_told(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        readers = [Reader() for _ in range(200)]
        reads = [
            asyncio.create_task(reader.read(front.runs.watch(TENANT, run))) for reader in readers
        ]
        for sequence in range(1, 4):
            await front.submit(call(sequence, run=run, method="DiscardGradient"))
        await front.delete(run)
        await asyncio.gather(*reads)

    assert {tuple(end.sequence for end in reader.ends) for reader in readers} == {(1, 2, 3)}


async def test_watchers_are_sent_away_when_the_service_stops(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        read = asyncio.create_task(Reader().read(front.runs.watch(TENANT, run)))
        await asyncio.sleep(0)
        front.runs.end_watches()

        with pytest.raises(Unavailable, match="watch again"):
            await read


async def test_what_nobody_comes_back_for_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LINGER_S", 0.0)
    async with fronting(tmp_path) as front:
        run = await front.create()
        watched = front.run(run)
        async with reading(front, run):
            async with reading(front, run):
                events = watched.watched
            assert watched.watched is events is not None
        await asyncio.sleep(0.01)
        assert watched.watched is None
        assert front.service.groups.followers == set()


async def some(events: AsyncGenerator[Event, None], count: int) -> list[Event]:
    """So many events, and then the watch is cut."""
    async with aclosing(events):
        return [await anext(events) for _ in range(count)]


async def test_a_watch_goes_on_behind_any_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever was the last to arrive, what follows is what follows in an unbroken watch."""
    monkeypatch.setattr(watching, "INTERVAL_S", 1e6)  # no news of the queue beside the outcomes
    async with fronting(tmp_path) as front:
        run = await front.create()

        def watch(after: int = 0) -> AsyncGenerator[Event, None]:
            return front.runs.watch(TENANT, run, after)

        async with reading(front, run):  # so that the list of events is older than the watches
            await front.submit(call(1, run=run, method="DiscardGradient"))
            async with aclosing(watch()) as unbroken:
                whole = [await anext(unbroken) for _ in range(2)]
                early = [
                    await some(watch(event.number), 2 - at) for at, event in enumerate(whole, 1)
                ]
                for sequence in range(2, 5):
                    await front.submit(call(sequence, run=run, method="DiscardGradient"))
                while len([e for e in whole if isinstance(e.what, CallEnd)]) < 3:
                    whole.append(await anext(unbroken))
                cut = [
                    await some(watch(event.number), len(whole) - at)
                    for at, event in enumerate(whole, 1)
                ]
    assert [type(event.what) for event in whole[:2]] == [RunView, QueueProgress]
    assert [event.number for event in whole] == sorted({event.number for event in whole})
    assert [[e.number for e in each] for each in early] == [[whole[1].number], []]
    for at, rest in enumerate(cut[1:], 2):
        assert rest == whole[at:]
    assert [end.what for end in cut[0] if isinstance(end.what, CallEnd)] == [
        end.what for end in whole if isinstance(end.what, CallEnd)
    ]


async def test_what_is_held_no_more_is_not_passed_over(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        first, second = await some(front.runs.watch(TENANT, run), 2)
        for sequence in range(1, KEPT_ENDS + 2):
            await front.submit(
                call(sequence, run=run, acknowledged=sequence - 1, method="DiscardGradient")
            )
        (third,) = await some(front.runs.watch(TENANT, run), 1)
        for number in (first.number, second.number, 7, third.number + 300, -4):
            with pytest.raises(EventsGone, match="watch from now on"):
                await some(front.runs.watch(TENANT, run, number), 1)
        assert await some(front.runs.watch(TENANT, run, third.number), 1)


async def test_events_of_another_life_are_not_taken_for_those_of_this(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        last = (await some(front.runs.watch(TENANT, run), 2))[-1]
    async with fronting(tmp_path) as front:
        with pytest.raises(EventsGone):
            await some(front.runs.watch(TENANT, run, last.number), 1)


async def test_another_tenants_run_cannot_be_watched(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        with pytest.raises(TrainingRunNotFound):
            front.runs.watch("bob", run)


async def test_a_lost_run_says_so(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        async with reading(front, run) as reader:
            front.run(run).lose("as the test says")
            while len(reader.views) < 2:
                await asyncio.sleep(0.01)

    assert [view.lost for view in reader.views] == ["", "as the test says"]

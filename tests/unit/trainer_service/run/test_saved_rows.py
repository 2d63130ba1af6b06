"""When rows are written to disk: a front with a real engine of sums."""

import asyncio
import itertools
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.engines.rows import MAX_BATCH_TOKENS
from tests.unit.trainer_service.fronts import Front, backward, fronting, optim_step
from trainer_service.run import saved_rows

assert MAX_BATCH_TOKENS > 20


def fronting_rows(store: Path, snapshot_s: float) -> AbstractAsyncContextManager[Front]:
    return fronting(store, engine_module="tests.engines.rows", snapshot_s=snapshot_s)


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    """Rows are written after so long that no test waits for it: what counts is set by hand."""
    async with fronting_rows(tmp_path, 1000.0) as made:
        yield made


def files(front: Front) -> list[str]:
    return sorted(path.name for path in (front.state / "snapshots").iterdir())


async def covered(front: Front, name: str) -> int:
    """The last call that is in the run's row on disk."""
    await front.service.journal.flush()
    database = sqlite3.connect(front.state / "journal.db")
    query = "SELECT sequence FROM saved_rows JOIN runs ON number = run WHERE training_run_id = ?"
    found = database.execute(query, (name,)).fetchone()
    database.close()
    return int(found[0]) if found else 0


async def until(front: Front, *names: str) -> None:
    """Waits for what is on its way to disk."""
    while files(front) != sorted(f"{name}.safetensors" for name in names):
        await asyncio.sleep(0.01)


async def until_covered(front: Front, name: str, sequence: int) -> None:
    """Waits until the journal names the row as it is behind a call, and nothing else is there."""
    while await covered(front, name) != sequence:
        await asyncio.sleep(0.01)
    await until(front, f"{name}-{sequence}")


async def test_a_row_is_written_at_the_first_step_after_enough_computing(front: Front) -> None:
    name = await front.create()
    await front.submit(backward(name, 1, [4]))
    front.run(name).unsaved.seconds = 2000.0
    await front.submit(backward(name, 2, [4]))  # a boundary is waited for
    assert files(front) == []

    await front.submit(optim_step(name, 3))

    await until_covered(front, name, 3)
    assert front.run(name).unsaved.calls == 0
    await front.submit(backward(name, 4, [4]))
    await front.submit(optim_step(name, 5))
    assert await covered(front, name) == 3  # and not again at the next


async def test_a_newer_row_takes_the_place_of_the_one_before(front: Front) -> None:
    name = await front.create()
    for first in (1, 3):
        await front.submit(backward(name, first, [4]))
        front.run(name).unsaved.seconds = 2000.0
        await front.submit(optim_step(name, first + 1))
        await until(front, f"{name}-{first + 1}")
    await front.delete(name)
    await until(front)


async def test_a_long_backlog_is_written_with_its_gradient(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = await front.create()
    monkeypatch.setattr(saved_rows, "LONGEST_BACKLOG_BYTES", 1)
    call = backward(name, 1, [4])
    object.__setattr__(call, "payload", b"two")

    await front.submit(call)

    await until_covered(front, name, 1)
    assert front.run(name).state.gradient.pending


async def test_idle_rows_are_written(tmp_path: Path) -> None:
    async with fronting_rows(tmp_path, 0.1) as front:
        busy, idle, untouched = [await front.create() for _ in range(3)]
        await front.submit(backward(idle, 1, [4]))
        await until_covered(front, idle, 1)
        assert await covered(front, busy) == await covered(front, untouched) == 0


async def test_a_row_that_cannot_be_written_is_tried_again_and_loses_nothing(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_rows, "RETRY_S", 0.0)
    name = await front.create()
    run = front.run(name)
    (front.state / "snapshots").rmdir()
    await front.submit(backward(name, 1, [4]))
    run.unsaved.seconds = 2000.0
    await front.submit(optim_step(name, 2))
    while not run.unsaved.calls:
        await asyncio.sleep(0.01)
    (front.state / "snapshots").mkdir()

    await front.submit(backward(name, 3, [4]))
    await front.submit(optim_step(name, 4))

    await until(front, f"{name}-4")


async def test_what_a_crash_left_beside_the_rows_is_removed(tmp_path: Path) -> None:
    async with fronting_rows(tmp_path, 1000.0) as front:
        name = await front.create()
        await front.submit(backward(name, 1, [4]))
        await front.service.services.saved_rows.want(front.run(name))
        await until(front, f"{name}-1")
        (front.state / "snapshots" / "run-x-7.safetensors").touch()
        (front.state / "snapshots" / ".draft").touch()

    async with fronting_rows(tmp_path, 1000.0) as front:
        assert files(front) == [f"{name}-1.safetensors"]


async def test_a_flooded_run_stops_no_other_row_from_being_saved(front: Front) -> None:
    """Even if its own row is wanted first: it is saved when the run comes to rest."""
    flooded, other = [await front.create() for _ in range(2)]
    for name in (flooded, other):
        await front.submit(backward(name, 1, [4]))
    front.scheduler.hold()
    calls = [front.submit(backward(flooded, number, [4])) for number in range(2, 66)]
    while front.run(flooded).numbers.in_flight < 64 or front.run(flooded).inbox.first:
        await asyncio.sleep(0)
    first = front.service.services.saved_rows.want(front.run(flooded))

    await front.service.services.saved_rows.want(front.run(other))

    assert await covered(front, other) == 1
    assert not first.done()
    await front.delete(flooded)
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_run_whose_calls_never_cease_comes_to_rest_for_its_own_row(front: Front) -> None:
    name, numbers = await front.create(), itertools.count(1)
    wanted, answered = asyncio.Event(), 0

    async def call_without_end() -> None:
        nonlocal answered
        while not wanted.is_set() and (number := next(numbers)) <= 800:
            await front.submit(backward(name, number, [12]))
            answered += 1

    callers = [asyncio.create_task(call_without_end()) for _ in range(60)]
    while answered < 100:
        await asyncio.sleep(0)
    await front.service.services.saved_rows.want(front.run(name))
    assert answered < 600
    wanted.set()
    await asyncio.gather(*callers)
    assert await covered(front, name) <= 600

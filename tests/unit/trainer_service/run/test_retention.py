"""Runs that nobody calls are deleted, and only those. The clock is the test's."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mint_core.errors import NotFound
from tests.unit.trainer_service.calls import call, compute
from tests.unit.trainer_service.fronts import TENANT, Front, fronting
from trainer_service.errors import TrainingRunExpired
from trainer_service.wire.requests import OpenRun

LIMIT_S = 100.0


async def pass_time(front: Front, seconds: float) -> None:
    front.clock.now_s += seconds
    await front.runs.expire()


def expired(front: Front, run: str) -> bool:
    """Whether the run is gone; asking counts as a call."""
    try:
        front.runs.get(TENANT, run)
    except NotFound as error:
        return isinstance(error, TrainingRunExpired)
    return False


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with fronting(tmp_path, LIMIT_S) as made:
        yield made


async def test_a_run_that_nobody_calls_is_deleted_and_says_why(front: Front) -> None:
    run, hasty, patient = await front.create(), await front.create(10.0), await front.create(1e6)

    await pass_time(front, LIMIT_S + 1)

    assert expired(front, run)
    assert expired(front, hasty)
    assert not expired(front, patient)
    with pytest.raises(TrainingRunExpired, match="retention time of 10 s") as caught:
        front.runs.get(TENANT, hasty)
    assert caught.value.reason == "TRAINING_RUN_NOT_FOUND"
    with pytest.raises(NotFound) as other:
        front.runs.get("bob", hasty)
    assert not isinstance(other.value, TrainingRunExpired)


async def test_every_call_starts_the_time_again(front: Front) -> None:
    by_get, by_open, by_call, idle = [await front.create() for _ in range(4)]

    for sequence in (1, 2, 3):
        await pass_time(front, 0.4 * LIMIT_S)
        front.runs.get(TENANT, by_get)
        await front.runs.open(TENANT, OpenRun(by_open, front.identity()))
        made = call(sequence, run=by_call, work=compute(4, backward=False), method="Forward")
        await front.runs.submit(TENANT, made)

    assert not any(expired(front, run) for run in (by_get, by_open, by_call))
    assert expired(front, idle)


async def test_a_call_that_takes_longer_than_the_retention_time_is_finished(front: Front) -> None:
    run, other = await front.create(), await front.create()
    long = asyncio.create_task(front.runs.submit(TENANT, call(1, run=run, work=compute(4))))
    await asyncio.sleep(0)  # it is accepted, and not yet with the engine

    await pass_time(front, LIMIT_S + 1)

    assert await long
    assert not expired(front, run)
    assert expired(front, other)

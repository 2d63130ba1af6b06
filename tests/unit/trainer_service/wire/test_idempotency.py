"""Requests that act once."""

import asyncio

import pytest

from mint_core.errors import FailedPrecondition
from trainer_service.errors import RequestIdReused
from trainer_service.wire.idempotency import REMEMBERED_S, Once
from trainer_service.wire.requests import Identity

ID = Identity("id", b"hash")


class Counter:
    """How often it was called, which is also its answer."""

    def __init__(self) -> None:
        self.count = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> int:
        self.count += 1
        await self.gate.wait()
        return self.count


async def test_the_same_request_acts_once() -> None:
    once, act = Once(), Counter()

    assert [await once.run("a", ID, act) for _ in range(3)] == [1, 1, 1]


async def test_a_repeat_joins_the_one_under_way() -> None:
    once, act = Once(), Counter()
    act.gate.clear()
    waiting = [asyncio.create_task(once.run("a", ID, act)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # its caller left; the request goes on
    act.gate.set()

    assert await waiting[1] == 1
    assert await once.run("a", ID, act) == 1


async def test_another_request_under_the_same_id_is_refused() -> None:
    once, act = Once(), Counter()
    await once.run("a", ID, act)

    with pytest.raises(RequestIdReused):
        await once.run("a", Identity("id", b"other"), act)


async def test_tenants_choose_ids_for_themselves() -> None:
    once, act = Once(), Counter()

    assert [await once.run(tenant, ID, act) for tenant in ("a", "b")] == [1, 2]


async def test_a_request_that_failed_may_be_tried_again() -> None:
    once, act = Once(), Counter()

    async def fail() -> int:
        raise FailedPrecondition("not now")

    with pytest.raises(FailedPrecondition):
        await once.run("a", ID, fail)
    assert await once.run("a", ID, act) == 1


async def test_ids_are_forgotten_after_a_day() -> None:
    now = 0.0
    once, act = Once(lambda: now), Counter()
    await once.run("a", ID, act)
    now = REMEMBERED_S - 1
    assert await once.run("a", ID, act) == 1

    now = REMEMBERED_S + 1

    assert await once.run("a", ID, act) == 2

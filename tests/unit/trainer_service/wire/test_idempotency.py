"""Requests that act once."""

import asyncio
import gc
import weakref
from typing import Any

import pytest

from mint_core.errors import FailedPrecondition
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import QuotaBook, QuotaExceeded, Quotas
from trainer_service.errors import RequestIdReused
from trainer_service.wire.idempotency import REMEMBERED_S, Joined, Once, remembered_ids
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


def new_once(most: int | None = None, **options: Any) -> Once:
    book = QuotaBook(None, Metrics())
    if most is not None:
        book.of = lambda tenant: Quotas(request_ids=most)  # type: ignore[method-assign]
    return Once(remembered_ids(book), **options)


async def test_the_same_request_acts_once() -> None:
    once, act = new_once(), Counter()

    assert [await once.run("a", ID, act) for _ in range(3)] == [1, 1, 1]


async def test_a_repeat_joins_the_one_under_way() -> None:
    once, act = new_once(), Counter()
    act.gate.clear()
    waiting = [asyncio.create_task(once.run("a", ID, act)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # its caller left; the request goes on
    act.gate.set()

    assert await waiting[1] == 1
    assert await once.run("a", ID, act) == 1


async def test_another_request_under_the_same_id_is_refused() -> None:
    once, act = new_once(), Counter()
    await once.run("a", ID, act)

    with pytest.raises(RequestIdReused):
        await once.run("a", Identity("id", b"other"), act)


async def test_tenants_choose_ids_for_themselves() -> None:
    once, act = new_once(), Counter()

    assert [await once.run(tenant, ID, act) for tenant in ("a", "b")] == [1, 2]


async def test_a_request_that_failed_may_be_tried_again() -> None:
    once, act = new_once(), Counter()

    async def fail() -> int:
        raise FailedPrecondition("not now")

    with pytest.raises(FailedPrecondition):
        await once.run("a", ID, fail)
    assert await once.run("a", ID, act) == 1


async def test_ids_are_forgotten_after_a_day() -> None:
    now = 0.0
    once, act = new_once(clock=lambda: now), Counter()
    await once.run("a", ID, act)
    now = REMEMBERED_S - 1
    assert await once.run("a", ID, act) == 1

    now = REMEMBERED_S + 1

    assert await once.run("a", ID, act) == 2


async def test_a_tenant_has_so_many_ids_remembered_and_may_always_delete() -> None:
    now = 0.0
    once, act = new_once(2, clock=lambda: now), Counter()
    once.recall("a", Identity("before", b""), since_s=0.0, answer=0)
    await once.run("a", Identity("second", b""), act)
    third = Identity("third", b"")

    with pytest.raises(QuotaExceeded, match="`request_ids`"):
        await once.run("a", third, act)
    assert await once.run("a", Identity("second", b""), act) == 1  # a repeat takes no room
    assert await once.run("b", third, act) == 2
    assert await once.run("a", Identity("deletion", b""), act, frees=True) == 3
    now = REMEMBERED_S + 1
    assert await once.run("a", third, act) == 4


async def test_what_failed_holds_no_id() -> None:
    once = new_once(1)

    async def fail() -> int:
        raise FailedPrecondition("not now")

    for number in range(3):
        with pytest.raises(FailedPrecondition):
            await once.run("a", Identity(str(number), b""), fail)


async def test_what_may_end_ends_with_the_last_caller() -> None:
    once, act = new_once(goes_on=False), Counter()
    act.gate.clear()
    waiting = [asyncio.create_task(once.run("a", ID, act)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    assert act.count == 1
    waiting[1].cancel()  # the last
    await asyncio.wait([waiting[1]])
    act.gate.set()

    assert await once.run("a", ID, act) == 2  # the first was given up


async def test_who_comes_while_it_is_given_up_has_it_done_anew() -> None:
    joined, ending = Joined(), asyncio.Event()

    async def slow_to_end() -> str:
        try:
            await asyncio.sleep(3600)
        finally:
            await ending.wait()
        return ""

    async def quick() -> str:
        return "done"

    first = asyncio.create_task(joined.run("key", slow_to_end))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)

    assert await joined.run("key", quick) == "done"
    ending.set()
    await asyncio.wait([first])
    assert first.cancelled()


async def test_nothing_but_the_answer_is_kept() -> None:
    class Large:
        pass

    once = new_once()
    large = Large()
    watched = weakref.ref(large)

    async def act(held: Large) -> int:
        await asyncio.sleep(0)
        return 1

    assert await once.run("a", ID, lambda held=large: act(held)) == 1  # type: ignore[misc]
    del large
    await asyncio.sleep(0)
    gc.collect()

    assert watched() is None

"""Tenants take turns; who leaves takes none; what has begun is waited for."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from mint_core.turns import Turns, Workers

LIMIT_S = 30.0


class Gate:
    """Work for threads that ends when it is let through."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._open = threading.Semaphore(0)

    def __call__(self, name: str) -> str:
        self.begun.append(name)
        assert self._open.acquire(timeout=LIMIT_S)
        return name

    def let(self, count: int = 1) -> None:
        self._open.release(count)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():
            await asyncio.sleep(0.001)


async def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    workers, gate = Workers(1, "test"), Gate()
    flood = [asyncio.create_task(workers.run("a", gate, f"a{i}")) for i in range(100)]
    await until(lambda: gate.begun == ["a0"])
    others = [asyncio.create_task(workers.run(t, gate, t)) for t in "bc"]
    await asyncio.sleep(0)
    gate.let(102)

    assert [await task for task in others] == ["b", "c"]
    assert await asyncio.gather(*flood) == [f"a{i}" for i in range(100)]
    assert gate.begun[:5] == ["a0", "a1", "b", "c", "a2"]


async def test_one_tenant_leaves_a_place_to_others() -> None:
    workers, gate = Workers(3, "test"), Gate()
    flood = [asyncio.create_task(workers.run("a", gate, "a")) for _ in range(10)]
    await until(lambda: len(gate.begun) == 2)
    other = asyncio.create_task(workers.run("b", gate, "b"))
    await until(lambda: "b" in gate.begun)

    assert gate.begun.count("a") == 2
    gate.let(11)
    await asyncio.gather(*flood, other)


async def test_what_has_not_begun_ends_with_its_caller_and_what_has_is_waited_for() -> None:
    workers, gate = Workers(1, "test"), Gate()
    first, second, third = (asyncio.create_task(workers.run("a", gate, name)) for name in "xyz")
    await until(lambda: gate.begun == ["x"])
    for task in (first, second):
        task.cancel()
    await asyncio.wait([second])
    first.cancel()
    await asyncio.sleep(0)
    assert not first.done()
    gate.let(2)

    assert await third == "z"
    assert first.cancelled()
    assert gate.begun == ["x", "z"]


async def test_a_place_that_is_granted_and_left_at_once_goes_to_the_next() -> None:
    turns = Turns(1)
    done = []

    async def take(tenant: str) -> None:
        async with turns.turn(tenant):
            await asyncio.sleep(0)
            done.append(tenant)

    async with turns.turn("a"):
        leaving, staying = (asyncio.create_task(take(tenant)) for tenant in "bc")
        await asyncio.sleep(0)
    leaving.cancel()  # it has the place already, and does not know yet
    await asyncio.gather(leaving, staying, return_exceptions=True)
    await take("d")

    assert done == ["c", "d"]


async def test_errors_come_to_the_caller_and_free_the_place() -> None:
    workers = Workers(1, "test")
    with pytest.raises(ZeroDivisionError):
        await workers.run("a", divmod, 1, 0)
    assert await workers.run("a", divmod, 3, 2) == (1, 1)


async def test_a_place_is_not_given_to_who_is_leaving() -> None:
    """Cancelled, it says so a turn of the loop later: a place that it got would be lost."""
    turns = Turns(1)

    async def take() -> None:
        async with turns.turn("b"):
            raise AssertionError("it had left")

    async with turns.turn("a"):
        leaving = asyncio.create_task(take())
        await asyncio.sleep(0)
        leaving.cancel()
    async with asyncio.timeout(LIMIT_S), turns.turn("c"):
        pass
    assert (await asyncio.gather(leaving, return_exceptions=True))[0].__class__ is (
        asyncio.CancelledError
    )

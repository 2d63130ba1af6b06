"""Who runs beside whom."""

import asyncio
from random import Random

import pytest

from trainer_service.run.turns import Turn, Turns


def granted(*turns: Turn) -> list[bool]:
    return [turn.granted.done() for turn in turns]


async def test_neighbours_that_may_share_run_together_and_an_exclusive_one_alone() -> None:
    turns = Turns()
    first, second = turns.take(exclusive=False), turns.take(exclusive=False)
    alone = turns.take(exclusive=True)
    last = turns.take(exclusive=False)
    assert granted(first, second, alone, last) == [True, False, False, False]
    turns.enter(first)
    assert granted(first, second, alone, last) == [True, True, False, False]
    turns.enter(second)

    turns.give_back(first)
    assert granted(alone, last) == [False, False]
    turns.give_back(second)
    assert granted(alone, last) == [True, False]
    turns.enter(alone)
    turns.give_back(alone)
    assert granted(last) == [True]


async def test_an_exclusive_turn_is_not_overtaken() -> None:
    turns = Turns()
    turns.enter(turns.take(exclusive=False))
    alone, later = turns.take(exclusive=True), turns.take(exclusive=False)

    assert granted(alone, later) == [False, False]


async def test_who_leaves_the_queue_lets_others_pass() -> None:
    turns = Turns()
    running = turns.take(exclusive=True)
    turns.enter(running)
    alone, later = turns.take(exclusive=True), turns.take(exclusive=False)

    async def wait() -> None:
        async with alone:
            pytest.fail("its turn came though it had left")

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    turns.give_back(running)

    assert granted(later) == [True]


@pytest.mark.parametrize("seed", range(50))
async def test_turns_begin_in_the_order_of_asking(seed: int) -> None:
    """Also those that are granted before their task has begun: they overtake no task that has, and
    waits to be woken.
    """
    random, turns, begun = Random(seed), Turns(), list[int]()

    async def work(number: int, turn: Turn) -> None:
        async with turn:
            begun.append(number)
            for _ in range(random.randrange(6)):
                await asyncio.sleep(0)

    async def ask(number: int, delay: int) -> None:
        for _ in range(delay):
            await asyncio.sleep(0)
        turn = turns.take(exclusive=random.random() < 0.3)
        asked.append(number)
        await asyncio.create_task(work(number, turn))

    asked = list[int]()
    await asyncio.gather(*(ask(number, random.randrange(8)) for number in range(12)))

    assert begun == asked

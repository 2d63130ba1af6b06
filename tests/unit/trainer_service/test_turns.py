"""Who runs beside whom."""

import asyncio

import pytest

from trainer_service.turns import Turn, Turns


def granted(*turns: Turn) -> list[bool]:
    return [turn.granted.done() for turn in turns]


async def test_neighbours_that_may_share_run_together_and_an_exclusive_one_alone() -> None:
    turns = Turns()
    first, second = turns.take(exclusive=False), turns.take(exclusive=False)
    alone = turns.take(exclusive=True)
    last = turns.take(exclusive=False)
    assert granted(first, second, alone, last) == [True, True, False, False]

    turns.give_back(first)
    assert granted(alone, last) == [False, False]
    turns.give_back(second)
    assert granted(alone, last) == [True, False]
    turns.give_back(alone)
    assert granted(last) == [True]


async def test_an_exclusive_turn_is_not_overtaken() -> None:
    turns = Turns()
    turns.take(exclusive=False)
    alone, later = turns.take(exclusive=True), turns.take(exclusive=False)

    assert granted(alone, later) == [False, False]


async def test_who_leaves_the_queue_lets_others_pass() -> None:
    turns = Turns()
    running = turns.take(exclusive=True)
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

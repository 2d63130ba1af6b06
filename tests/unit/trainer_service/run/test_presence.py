"""Calls that wait for a row go on in their order."""

import asyncio

import pytest

from mint_core.errors import FailedPrecondition
from trainer_service.run.presence import Presence


async def test_calls_go_on_one_after_the_other_in_their_order() -> None:
    presence = Presence()
    gone_on: list[int] = []

    async def call(sequence: int) -> None:
        await presence.park(sequence)
        gone_on.append(sequence)

    calls = [asyncio.create_task(call(sequence)) for sequence in (7, 5, 6)]
    await asyncio.sleep(0)
    assert presence.parked == 3
    presence.wake()
    assert presence.parked_before(6)  # 5 is free to go on, and has not yet
    late = asyncio.create_task(call(8))
    await asyncio.gather(*calls, late)

    assert gone_on == [5, 6, 7, 8]
    assert not presence.parked_before(9)


async def test_a_row_that_cannot_be_restored_fails_all_who_wait() -> None:
    presence = Presence()
    calls = [asyncio.create_task(presence.park(sequence)) for sequence in (1, 2)]
    await asyncio.sleep(0)

    presence.wake(FailedPrecondition("no"))

    for call in calls:
        with pytest.raises(FailedPrecondition):
            await call


async def test_a_call_that_leaves_holds_up_nobody() -> None:
    presence = Presence()
    first, second = (asyncio.create_task(presence.park(sequence)) for sequence in (1, 2))
    await asyncio.sleep(0)
    presence.wake()
    first.cancel()

    await asyncio.gather(first, second, return_exceptions=True)

    assert second.exception() is None

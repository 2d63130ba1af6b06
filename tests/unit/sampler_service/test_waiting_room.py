"""How many continuations are accepted, and when to come again."""

from contextlib import ExitStack

import pytest

from mint_core.backlog import Load
from sampler_service.waiting_room import SHARES, UNKNOWN_WAIT_S, QueueFull, WaitingRoom


class Room:
    """A room of 4 continuations or 100 tokens per tenant, and its clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.room = WaitingRoom(Load(count=4, tokens=100), clock=lambda: self.now_s)
        self._places: list[ExitStack] = []

    def take(self, tenant: str, count: int = 1, tokens: int = 10) -> ExitStack:
        place = ExitStack()
        place.enter_context(self.room.place(tenant, Load(count=count, tokens=tokens)))
        self._places.append(place)  # or it would be given up when its last user forgets it
        return place

    def refusal(self, tenant: str, count: int = 1) -> QueueFull:
        with pytest.raises(QueueFull) as caught:
            self.take(tenant, count)
        return caught.value

    def wait_s(self, tenant: str, count: int = 1) -> float:
        wait_s = self.refusal(tenant, count).retry_after_s
        assert wait_s is not None
        return wait_s


def test_a_tenant_has_its_share_and_gets_it_back() -> None:
    room = Room()
    places = [room.take("ann") for _ in range(4)]

    error = room.refusal("ann")
    room.take("bob").close()
    places[2].close()
    room.take("ann")

    assert error.metadata == {
        "samples": "4",
        "tokens": "40",
        "max_samples": "4",
        "max_tokens": "100",
    }
    assert "of yours" in error.message
    assert room.room.samples == 4


def test_a_request_of_any_size_is_taken_while_there_is_room() -> None:
    room = Room()
    room.take("ann", count=3)
    with room.take("ann", count=1000, tokens=10_000):
        assert room.room.samples == 1003
        room.refusal("ann")
    room.take("ann")


def test_long_prompts_fill_the_room_too() -> None:
    room = Room()
    with room.take("ann", tokens=99):
        room.take("ann", tokens=1)
        room.refusal("ann")


def test_all_tenants_together_have_a_few_shares() -> None:
    room = Room()
    tenants = [f"tenant-{number}" for number in range(2 * SHARES)]
    for tenant in tenants:
        room.take(tenant, count=2)

    assert "of all callers" in room.refusal("another").message
    assert "of all callers" in room.refusal(tenants[0]).message


def test_a_place_is_free_again_when_its_request_fails() -> None:
    room = Room()
    with pytest.raises(ZeroDivisionError), room.take("ann", count=4):
        raise ZeroDivisionError
    room.take("ann")


def test_before_anything_has_finished_the_wait_is_a_guess() -> None:
    room = Room()
    room.take("ann", count=4)
    assert room.wait_s("ann") == UNKNOWN_WAIT_S


def test_the_wait_follows_from_how_fast_the_tenants_own_finish() -> None:
    room = Room()
    room.take("ann", count=4)
    room.take("bob", count=2)
    for _ in range(20):
        room.now_s += 0.5
        room.take("bob").close()
    room.take("bob", count=2)

    assert room.wait_s("bob") == pytest.approx(0.5, rel=0.1)
    assert room.wait_s("ann") == UNKNOWN_WAIT_S


def test_a_steady_flow_is_measured_and_promised_once() -> None:
    room = Room()
    waiting = [room.take("ann") for _ in range(4)]
    for _ in range(40):  # four a second
        room.now_s += 0.25
        waiting.pop(0).close()
        waiting.append(room.take("ann"))

    first, second = room.wait_s("ann"), room.wait_s("ann")
    large = room.wait_s("ann", count=12)

    assert first == pytest.approx(0.25, rel=0.1)
    assert second == pytest.approx(0.50, rel=0.1)
    assert large == pytest.approx(3.5, rel=0.1)
    room.now_s += 10.0  # the promises are over
    waiting.pop(0).close()
    waiting.append(room.take("ann"))
    assert room.wait_s("ann") < 1.0


def test_the_wait_is_neither_a_storm_nor_an_age() -> None:
    room = Room()
    waiting = [room.take("ann") for _ in range(4)]
    for _ in range(1000):
        room.now_s += 0.001
        waiting.pop(0).close()
        waiting.append(room.take("ann"))
    assert room.wait_s("ann") == 0.1
    assert [room.wait_s("ann", count=1000 * n) for n in (100, 100)] == [10.0, 10.0]

"""The order of calls, repeats, and what is kept for them."""

import asyncio
import gc
import weakref
from collections.abc import Sequence as Seq
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_core.errors import InvalidRequest, MintError, ResourceExhausted
from tests.unit.trainer_service.calls import call
from trainer_service.calls import Call, Refused, Reply
from trainer_service.errors import (
    AnswerAcknowledged,
    AnswerDropped,
    AnswersUnacknowledged,
    EarlyArrivalsFull,
    QueueFull,
    SequenceGap,
    SequenceReused,
    TooManyCallsInFlight,
    WriterFenced,
)
from trainer_service.run.call_numbers import WINDOW, Arrival, CallLimits, CallNumbers
from trainer_service.run_description import RunState

ANSWER = Reply(b"answer", failed=False)


class Recorder:
    """Numbers, what stands behind them, and the calls that they have let in."""

    def __init__(self, **limits: float) -> None:
        self.accepted: list[Call] = []
        self.acknowledged: list[tuple[int, int]] = []
        self.held: list[int] = []
        self.room = 1000  # for early arrivals
        self.sequence = CallNumbers(self, CallLimits(**limits), self, None)  # type: ignore[arg-type]

    def call_refusal(self, origin: object, calls_before: int) -> MintError | None:
        return None

    def accept(self, call: Call) -> None:
        self.accepted.append(call)

    def drop(self, before: int, upto: int) -> None:
        self.acknowledged.append((before, upto))

    def hold(self, origin: object, call: Call) -> MintError | None:
        if len(self.held) >= self.room:
            return EarlyArrivalsFull(0, 0)
        self.held.append(call.place.sequence)
        return None

    def unhold(self, origin: object, call: Call) -> None:
        self.held.remove(call.place.sequence)

    @property
    def numbers(self) -> list[int]:
        return [call.place.sequence for call in self.accepted]

    def answer(self, *sequences: int) -> None:
        for sequence in sequences:
            self.sequence.answer(sequence, ANSWER)

    def serve(self, *sequences: int) -> None:
        """Lets calls in, answers them, and tells their RPCs."""
        for sequence in sequences:
            arrival = self.sequence.arrive(call(sequence))
            self.answer(sequence)
            self.sequence.told(arrival)


async def test_early_arrivals_take_room_until_they_are_let_in_leave_or_are_given_up() -> None:
    recorder = Recorder(gap_s=0.01)
    recorder.room = 3
    arrivals = [recorder.sequence.arrive(call(number)) for number in (2, 3, 5)]
    with pytest.raises(EarlyArrivalsFull):
        recorder.sequence.arrive(call(4))
    recorder.sequence.leave(arrivals[1])
    recorder.sequence.arrive(call(4))
    assert recorder.held == [2, 5, 4]
    recorder.sequence.arrive(call(1))  # which always finds room
    assert recorder.numbers == [1, 2]
    assert recorder.held == [5, 4]
    with pytest.raises(SequenceGap):
        await arrivals[2].reply
    await asyncio.sleep(0.02)
    assert recorder.held == []


async def test_calls_are_accepted_in_order_whatever_order_they_arrive_in() -> None:
    recorder = Recorder()
    for number in (3, 2, 5, 1, 4):
        recorder.sequence.arrive(call(number))

    assert recorder.numbers == [1, 2, 3, 4, 5]


@settings(max_examples=50)
@given(st.permutations(range(1, 9)), st.lists(st.integers(1, 8), max_size=6))
def test_every_number_acts_once(order: Seq[int], repeats: Seq[int]) -> None:
    async def run() -> None:
        recorder = Recorder()
        arrivals = [recorder.sequence.arrive(call(number)) for number in [*order, *repeats]]
        recorder.answer(*range(1, 9))
        arrivals += [recorder.sequence.arrive(call(number)) for number in repeats]

        assert recorder.numbers == list(range(1, 9))
        for arrival in arrivals:
            assert await arrival.reply == ANSWER

    asyncio.run(run())


async def test_a_repeat_gets_the_recorded_outcome_or_waits_for_it() -> None:
    recorder = Recorder()
    first = recorder.sequence.arrive(call(1))
    pending = recorder.sequence.arrive(call(1))
    assert not pending.reply.done()

    recorder.answer(1)
    late = recorder.sequence.arrive(call(1))

    assert await first.reply is await pending.reply is await late.reply is ANSWER
    assert recorder.numbers == [1]


async def test_an_error_is_an_outcome_too_and_uses_up_its_number() -> None:
    recorder = Recorder()
    recorder.sequence.arrive(call(1))
    recorder.sequence.answer(1, error := Reply(b"no", failed=True))

    assert await recorder.sequence.arrive(call(1)).reply is error
    assert recorder.sequence.next_sequence == 2


async def test_another_payload_under_a_used_number_is_refused() -> None:
    recorder = Recorder()
    recorder.sequence.arrive(call(1, payload="a"))
    with pytest.raises(SequenceReused):
        recorder.sequence.arrive(call(1, payload="b"))
    recorder.answer(1)
    with pytest.raises(SequenceReused) as caught:
        recorder.sequence.arrive(call(1, payload="b"))

    assert caught.value.metadata == {"sequence": "1"}


async def test_of_two_early_arrivals_with_one_number_the_first_wins() -> None:
    recorder = Recorder()
    first = recorder.sequence.arrive(call(2, payload="a"))
    other = recorder.sequence.arrive(call(2, payload="b"))
    again = recorder.sequence.arrive(call(2, payload="a"))

    recorder.sequence.arrive(call(1))
    recorder.answer(1, 2)

    assert recorder.numbers == [1, 2]
    assert await first.reply == await again.reply == ANSWER
    with pytest.raises(SequenceReused):
        await other.reply


async def test_an_early_arrival_is_held_for_a_while_only() -> None:
    recorder = Recorder(gap_s=0.01)
    early = recorder.sequence.arrive(call(3))

    with pytest.raises(SequenceGap) as caught:
        await early.reply

    assert caught.value.metadata == {"sequence": "3", "missing_sequence": "1"}
    assert "waits for 1, which has not arrived" in caught.value.message
    recorder.sequence.arrive(call(1))
    recorder.sequence.arrive(call(2))
    assert recorder.numbers == [1, 2]  # 3 was not accepted


async def test_at_most_so_many_early_arrivals_are_held() -> None:
    recorder = Recorder(held_calls=2)
    recorder.sequence.arrive(call(2))
    recorder.sequence.arrive(call(3))

    with pytest.raises(SequenceGap):
        recorder.sequence.arrive(call(4))


async def test_an_early_arrival_goes_with_its_rpc() -> None:
    recorder = Recorder()
    early = recorder.sequence.arrive(call(2))

    recorder.sequence.leave(early)
    recorder.sequence.arrive(call(1))

    assert recorder.numbers == [1]


async def test_an_accepted_call_outlives_its_rpc() -> None:
    recorder = Recorder()
    arrival = recorder.sequence.arrive(call(1))

    arrival.reply.cancel()
    recorder.sequence.leave(arrival)
    recorder.answer(1)

    assert await recorder.sequence.arrive(call(1)).reply == ANSWER


async def test_what_rpcs_brought_goes_with_them() -> None:
    """The call itself is kept, and of its thousand repeats nothing."""
    recorder = Recorder()
    arrivals = [recorder.sequence.arrive(call(1)) for _ in range(1000)]
    replies = [weakref.ref(arrival.reply) for arrival in arrivals]

    for arrival in arrivals:
        recorder.sequence.leave(arrival)
    del arrival, arrivals
    gc.collect()

    assert not any(reply() for reply in replies)
    assert Arrival not in map(type, gc.get_objects())
    recorder.answer(1)
    assert await recorder.sequence.arrive(call(1)).reply == ANSWER


async def test_acknowledged_answers_are_dropped() -> None:
    recorder = Recorder()
    recorder.sequence.arrive(call(1))
    recorder.answer(1)

    recorder.sequence.arrive(call(2, acknowledged=1))

    assert recorder.acknowledged == [(0, 1)]
    with pytest.raises(AnswerAcknowledged) as caught:
        recorder.sequence.arrive(call(1))
    assert caught.value.metadata == {"sequence": "1", "acknowledged_sequence": "1"}


async def test_what_has_not_been_answered_cannot_be_acknowledged() -> None:
    recorder = Recorder()
    recorder.sequence.arrive(call(1))
    recorder.sequence.arrive(call(2))
    recorder.answer(2)  # 1 is still out, so nothing is answered "up to"

    recorder.sequence.arrive(call(3, acknowledged=1))

    refused = recorder.accepted[2].work  # it keeps its number, and that is its outcome
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, InvalidRequest)
    assert refused.error.field == "acknowledged_sequence"
    assert "only calls up to 0 are answered" in refused.error.message


async def test_an_older_acknowledgement_takes_nothing_back() -> None:
    recorder = Recorder()
    for number in (1, 2):
        recorder.sequence.arrive(call(number))
    recorder.answer(1, 2)
    recorder.sequence.arrive(call(3, acknowledged=2))

    recorder.sequence.arrive(call(4, acknowledged=1))

    with pytest.raises(AnswerAcknowledged):
        recorder.sequence.arrive(call(2))


async def test_unacknowledged_answers_are_kept_up_to_a_number() -> None:
    recorder = Recorder(kept_answers=2)
    for number in (1, 2):
        recorder.sequence.arrive(call(number))
    recorder.answer(1, 2)

    with pytest.raises(AnswersUnacknowledged) as caught:
        recorder.sequence.arrive(call(3))
    assert caught.value.retry_after_s is not None
    recorder.sequence.arrive(call(3, acknowledged=1))  # its own acknowledgement counts first

    assert recorder.numbers == [1, 2, 3]


async def test_unacknowledged_answers_are_kept_up_to_a_size() -> None:
    recorder = Recorder(kept_bytes=1_000_000)
    recorder.sequence.arrive(call(1))
    recorder.sequence.answer(1, Reply(bytes(1_000_000), failed=False))

    with pytest.raises(AnswersUnacknowledged):
        recorder.sequence.arrive(call(2))
    recorder.sequence.arrive(call(2, acknowledged=1))

    assert recorder.numbers == [1, 2]


async def test_what_was_told_long_ago_makes_room_for_who_never_acknowledges() -> None:
    recorder = Recorder(kept_answers=WINDOW + 2)
    recorder.serve(*range(1, 1000))

    dropped = recorder.sequence.dropped
    assert dropped == 999 - 1 - (WINDOW + 1)  # no more than must be
    assert await recorder.sequence.arrive(call(dropped + 1)).reply == ANSWER
    with pytest.raises(AnswerDropped) as caught:
        recorder.sequence.arrive(call(dropped))
    assert caught.value.metadata == {"sequence": str(dropped), "dropped_sequence": str(dropped)}
    recorder.serve(1000)
    recorder.sequence.arrive(call(1001, acknowledged=1000))
    with pytest.raises(AnswerAcknowledged):
        recorder.sequence.arrive(call(1))


async def test_an_answer_that_no_rpc_has_had_is_never_dropped() -> None:
    recorder = Recorder(kept_answers=WINDOW + 10)
    left = recorder.sequence.arrive(call(1))
    recorder.sequence.leave(left)
    recorder.answer(1)
    recorder.serve(*range(2, WINDOW + 11))
    with pytest.raises(AnswersUnacknowledged):
        recorder.sequence.arrive(call(WINDOW + 11))

    recorder.sequence.told(recorder.sequence.arrive(call(1)))
    recorder.serve(WINDOW + 11)
    with pytest.raises(AnswerDropped):
        recorder.sequence.arrive(call(1))


async def test_no_answer_within_the_window_is_dropped_however_large() -> None:
    recorder = Recorder(kept_bytes=1_000_000)
    arrival = recorder.sequence.arrive(call(1))
    recorder.sequence.answer(1, Reply(bytes(1_000_000), failed=False))
    recorder.sequence.told(arrival)
    with pytest.raises(AnswersUnacknowledged):
        recorder.sequence.arrive(call(2))


@pytest.mark.parametrize("restarted", [True, False])
async def test_a_restart_or_an_opening_counts_as_told(restarted: bool) -> None:
    """Nobody knows any more what RPCs have had, or asks for it."""
    recorder, many = Recorder(kept_answers=WINDOW + 10), WINDOW + 10
    if restarted:
        past = [(number, call(number).place.payload_hash, ANSWER) for number in range(3, many + 3)]
        recorder.sequence.resume(RunState(acknowledged=1, dropped=2, writer_epoch=2), past)
    else:
        for number in range(1, many + 1):
            recorder.sequence.arrive(call(number))
            recorder.answer(number)
        recorder.sequence.open()
    recorder.sequence.arrive(call(recorder.sequence.next_sequence, epoch=2))
    with pytest.raises(AnswerDropped):
        recorder.sequence.arrive(call(3 if restarted else 1, epoch=2))


async def test_a_full_queue_refuses_the_number_and_all_above_it() -> None:
    recorder = Recorder(calls_in_flight=2)
    recorder.sequence.arrive(call(1))
    later = [recorder.sequence.arrive(call(number)) for number in (3, 4)]
    recorder.sequence.arrive(call(2))

    for arrival in later:
        with pytest.raises(TooManyCallsInFlight):
            await arrival.reply
    with pytest.raises(ResourceExhausted):
        recorder.sequence.arrive(call(3))
    recorder.answer(1)
    recorder.sequence.arrive(call(3))  # the refusal has used up nothing

    assert recorder.numbers == [1, 2, 3]


async def test_opening_fences_earlier_writers_and_drops_early_arrivals() -> None:
    recorder = Recorder()
    recorder.sequence.arrive(call(1))
    early = recorder.sequence.arrive(call(3))

    assert recorder.sequence.open() == 2

    with pytest.raises(WriterFenced) as caught:
        await early.reply
    assert caught.value.metadata == {"writer_epoch": "1", "current_writer_epoch": "2"}
    with pytest.raises(WriterFenced):
        recorder.sequence.arrive(call(2, epoch=1))
    recorder.sequence.arrive(call(2, epoch=2))
    assert recorder.numbers == [1, 2]


async def test_a_repeat_may_come_from_the_new_writer() -> None:
    recorder = Recorder()
    recorder.sequence.arrive(call(1))
    recorder.answer(1)
    recorder.sequence.open()

    assert await recorder.sequence.arrive(call(1, epoch=2)).reply == ANSWER


async def test_an_epoch_that_was_never_given_uses_up_nothing() -> None:
    recorder = Recorder()
    with pytest.raises(InvalidRequest) as caught:
        recorder.sequence.arrive(call(1, epoch=5))

    assert caught.value.field == "writer_epoch"
    assert recorder.sequence.next_sequence == 1


class Bounded(Recorder):
    """Accepts no call while two are under way, as a tenant's full queue does."""

    def call_refusal(self, origin: object, calls_before: int) -> QueueFull | None:
        if self.sequence.in_flight < 2:
            return None
        return QueueFull(
            calls=2, tokens=0, max_calls=2, max_tokens=1, retry_after_s=1.0 + calls_before
        )


async def test_a_full_queue_refuses_a_number_and_all_above_it_and_uses_none_up() -> None:
    bounded = Bounded()
    early = bounded.sequence.arrive(call(4))  # while there is room
    for number in (1, 2):
        bounded.sequence.arrive(call(number))

    for number, wait_s in ((3, 1.0), (4, 2.0), (7, 5.0)):
        with pytest.raises(QueueFull) as caught:
            bounded.sequence.arrive(call(number))
        assert caught.value.retry_after_s == wait_s  # those above come later
    with pytest.raises(QueueFull) as caught:
        await early.reply
    assert caught.value.retry_after_s == 2.0
    assert bounded.sequence.next_sequence == 3

    bounded.answer(1)
    above = bounded.sequence.arrive(call(4))  # there is room, but 3 comes first
    bounded.sequence.arrive(call(3))
    assert bounded.numbers == [1, 2, 3]
    with pytest.raises(QueueFull):
        await above.reply
    bounded.answer(2)
    bounded.sequence.arrive(call(4))
    assert bounded.numbers == [1, 2, 3, 4]


async def test_a_repeat_is_answered_though_the_queue_is_full() -> None:
    bounded = Bounded()
    bounded.sequence.arrive(call(1))
    bounded.answer(1)
    for number in (2, 3):
        bounded.sequence.arrive(call(number))

    assert await bounded.sequence.arrive(call(1)).reply == ANSWER


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_calls_that_are_refused_and_sent_again_act_once_and_in_order(seed: int) -> None:
    random = Random(seed)

    async def run() -> None:
        bounded = Bounded()
        waiting: dict[int, Arrival | None] = dict.fromkeys(range(1, 13))
        done = 0
        while done < 12:
            number = random.choice([n for n in waiting if n > done])
            arrival = waiting[number]
            if arrival is None or (arrival.reply.done() and arrival.reply.exception()):
                try:
                    waiting[number] = bounded.sequence.arrive(call(number))
                except QueueFull:
                    waiting[number] = None
            if bounded.accepted[done:] and random.random() < 0.3:
                done += 1
                bounded.answer(done)
        assert bounded.numbers == list(range(1, 13))
        assert all(a is None or not a.reply.exception() for a in waiting.values())

    asyncio.run(run())

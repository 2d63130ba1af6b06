"""The order of a run's calls: early arrivals wait, repeats get the same answer, a number acts once.

All state of that promise is here: `_admit` is where a call is accepted, `record` where its outcome
is known, `answer` where it is told, once the journal has it on disk. Nothing here waits.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from mint_core.errors import InvalidRequest, MintError
from mint_core.rpc.limits import MAX_CALLS_IN_FLIGHT_PER_RUN
from trainer_service import errors
from trainer_service.calls import Call, Place, Refused, Reply
from trainer_service.queue.admission import Admission
from trainer_service.run_description import RunOrigin, RunState

_SMALL_BYTES = 1024  # of an answer, beside its content, about
WINDOW = 64  # numbers behind the newest whose answers are kept until they are acknowledged


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """Of one run."""

    held_calls: int = 64
    gap_s: float = 60.0  # how long an early arrival is held
    calls_in_flight: int = MAX_CALLS_IN_FLIGHT_PER_RUN
    kept_answers: int = 1024  # answers that are not acknowledged, those to come included
    kept_bytes: int = 64 * 1024 * 1024


@dataclass(slots=True, eq=False)
class Arrival:
    """A call as one RPC brought it. `reply` is that RPC's own: to cancel it cancels no more."""

    call: Call
    reply: asyncio.Future[Reply]
    timer: asyncio.TimerHandle | None = None  # while it is held

    def fail(self, error: MintError) -> None:
        _fail(self.reply, error)


@dataclass(slots=True, eq=False)
class _Entry:
    """An accepted number."""

    payload_hash: bytes
    waiting: set[asyncio.Future[Reply]] = field(default_factory=set)  # RPCs that are here
    reply: Reply | None = None
    told: bool = False  # to an RPC that was there

    @property
    def size_bytes(self) -> int:
        return _SMALL_BYTES + len(self.reply.content) if self.reply else 0


class Intake(Protocol):
    """What stands behind the numbers of a run."""

    def accept(self, call: Call) -> None:
        """Takes the call whose number is next."""

    def drop(self, before: int, upto: int) -> None:
        """Drops the answers behind one number, up to another."""


class CallNumbers:
    """The numbers of one run. All methods belong to one event loop and return at once."""

    def __init__(
        self, intake: Intake, limits: CallLimits, admission: Admission, origin: RunOrigin
    ) -> None:
        self._intake = intake
        self._limits = limits
        self._admission = admission
        self._origin = origin  # of the run
        self._entries: dict[int, _Entry] = {}  # accepted and not dropped
        self._held: dict[int, list[Arrival]] = {}
        self._kept_bytes = 0
        self.in_flight = 0  # calls accepted and not answered
        self.acknowledged = 0
        self.dropped = 0  # answers up to here are gone: acknowledged, or told long ago
        self._told = 0  # all numbers up to here are, as far as anybody knows
        self._answered = 0  # all numbers up to here are
        self.next_sequence = 1
        self.writer_epoch = 1

    def arrive(self, call: Call) -> Arrival:
        """Takes a call that an RPC brought. Raises refusals that are known at once.

        Later ones, which use up nothing either, and the answer come through the arrival.
        """
        arrival = Arrival(call, asyncio.get_running_loop().create_future())
        self._place(arrival)
        self._admit_held()
        return arrival

    def leave(self, arrival: Arrival) -> None:
        """Forgets an RPC that has ended. An early arrival goes too; an accepted call goes on."""
        if arrival.timer is not None:
            self._unhold(arrival)
        elif entry := self._entries.get(arrival.call.place.sequence):
            entry.waiting.discard(arrival.reply)

    def told(self, arrival: Arrival) -> None:
        """Notes that an RPC that is still there has got its answer."""
        if entry := self._entries.get(arrival.call.place.sequence):
            entry.told = True
        while (entry := self._entries.get(self._told + 1)) and entry.told:
            self._told += 1

    def answer(self, sequence: int, reply: Reply) -> None:
        """Answers all who wait for an accepted number, and will ask for it."""
        entry = self._entries[sequence]
        assert entry.reply is None, f"sequence {sequence} is answered twice"
        entry.reply = reply
        self._kept_bytes += entry.size_bytes
        self.in_flight -= 1
        while self._is_answered(self._answered + 1):
            self._answered += 1
        for waiting in entry.waiting:
            if not waiting.done():
                waiting.set_result(reply)
        entry.waiting.clear()

    def _is_answered(self, sequence: int) -> bool:
        entry = self._entries.get(sequence)
        return entry is not None and entry.reply is not None

    def resume(self, state: RunState, past: Iterable[tuple[int, bytes, Reply | None]]) -> None:
        """Goes on behind the numbers of before a restart: each, its hash, its reply so far."""
        self.acknowledged = state.acknowledged
        self.dropped = self._answered = state.dropped
        self.writer_epoch = state.writer_epoch
        self.next_sequence = state.dropped + 1
        for sequence, payload_hash, reply in past:
            assert sequence == self.next_sequence, "the journal has a gap"
            self.next_sequence += 1
            self._entries[sequence] = _Entry(payload_hash)
            self.in_flight += 1
            if reply is not None:
                self.answer(sequence, reply)
        self._told = self.next_sequence - 1  # who has not been asks again, or opens the run

    def abandon(self, error: MintError) -> None:
        """Fails all who wait: nothing will be answered any more."""
        for entry in self._entries.values():
            for waiting in entry.waiting:
                _fail(waiting, error)
            entry.waiting.clear()
        for arrival in self._take_held():
            arrival.fail(error)

    def open(self) -> int:
        """Starts a new epoch: early arrivals are dropped and calls of older epochs fenced."""
        self.writer_epoch += 1
        self._told = self.next_sequence - 1  # to a new writer, who goes on behind them
        for arrival in self._take_held():
            arrival.fail(errors.WriterFenced(arrival.call.place.writer_epoch, self.writer_epoch))
        return self.writer_epoch

    def _place(self, arrival: Arrival) -> None:
        place = arrival.call.place
        self._check_epoch(place)
        self._acknowledge(arrival)
        if place.sequence < self.next_sequence:
            self._repeat(arrival)
        elif place.sequence == self.next_sequence:
            self._admit(arrival)
        else:
            self._hold(arrival)

    def _check_epoch(self, place: Place) -> None:
        if place.writer_epoch < self.writer_epoch:
            raise errors.WriterFenced(place.writer_epoch, self.writer_epoch)
        if place.writer_epoch > self.writer_epoch:
            # Not recorded: a stranger must not use up the writer's numbers.
            raise InvalidRequest(
                f"`writer_epoch` {place.writer_epoch} was never given; send the one that create "
                "or open answered",
                field="writer_epoch",
                writer_epoch=place.writer_epoch,
            )

    def _acknowledge(self, arrival: Arrival) -> None:
        place = arrival.call.place
        acknowledged = place.acknowledged_sequence
        if acknowledged > self._answered:
            if place.sequence < self.next_sequence:
                return  # it has its outcome, perhaps this very refusal
            error = InvalidRequest(
                f"`acknowledged_sequence` is {acknowledged} but only calls up to {self._answered} "
                "are answered; "
                "acknowledge only answers that have arrived",
                field="acknowledged_sequence",
                acknowledged_sequence=acknowledged,
                answered=self._answered,
            )
            arrival.call = replace(arrival.call, work=Refused(error))
            return
        if acknowledged <= self.acknowledged:
            return
        self.acknowledged = acknowledged
        self._drop(acknowledged)

    def _drop(self, upto: int) -> None:
        for sequence in range(self.dropped + 1, upto + 1):
            self._kept_bytes -= self._entries.pop(sequence).size_bytes
        before, self.dropped = self.dropped, max(self.dropped, upto)
        self._told = max(self._told, self.dropped)
        if before < self.dropped:
            self._intake.drop(before, self.dropped)

    def _repeat(self, arrival: Arrival) -> None:
        place = arrival.call.place
        if place.sequence <= self.acknowledged:
            raise errors.AnswerAcknowledged(place.sequence, self.acknowledged)
        if place.sequence <= self.dropped:
            raise errors.AnswerDropped(place.sequence, self.dropped)
        entry = self._entries[place.sequence]
        if entry.payload_hash != place.payload_hash:
            raise errors.SequenceReused(place.sequence)
        if entry.reply is not None:
            arrival.reply.set_result(entry.reply)
        else:
            entry.waiting.add(arrival.reply)

    def _admit(self, arrival: Arrival) -> None:
        place = arrival.call.place
        if error := self._full(place.sequence):
            # A refused number has no successors: they would only wait in vain.
            for later in self._take_held():
                later.fail(self._full(later.call.place.sequence) or error)
            raise error
        self._entries[place.sequence] = _Entry(place.payload_hash, {arrival.reply})
        self.next_sequence += 1
        self.in_flight += 1
        self._intake.accept(arrival.call)

    def _full(self, sequence: int) -> MintError | None:
        limits = self._limits
        if self.in_flight >= limits.calls_in_flight:
            return errors.TooManyCallsInFlight(limits.calls_in_flight)
        told_long_ago = min(self._told, self._answered, self.next_sequence - 2 - WINDOW)
        while self._keeps_all_it_may() and self.dropped < told_long_ago:
            self._drop(self.dropped + 1)  # or a client that acknowledges nothing would be stuck
        if self._keeps_all_it_may():
            return errors.AnswersUnacknowledged(len(self._entries), self._kept_bytes)
        return self._admission.call_refusal(self._origin, sequence - self.next_sequence)

    def _keeps_all_it_may(self) -> bool:
        limits = self._limits
        kept = len(self._entries)
        return kept >= limits.kept_answers or self._kept_bytes >= limits.kept_bytes

    def _hold(self, arrival: Arrival) -> None:
        sequence = arrival.call.place.sequence
        if error := self._full(sequence):
            raise error  # as the number before it is, or would be
        if sum(map(len, self._held.values())) >= self._limits.held_calls:
            raise errors.SequenceGap(sequence, self.next_sequence)
        if error := self._admission.hold(self._origin, arrival.call):
            raise error
        loop = asyncio.get_running_loop()
        arrival.timer = loop.call_later(self._limits.gap_s, self._give_up, arrival)
        self._held.setdefault(sequence, []).append(arrival)

    def _give_up(self, arrival: Arrival) -> None:
        self._unhold(arrival)
        arrival.fail(errors.SequenceGap(arrival.call.place.sequence, self.next_sequence))

    def _unhold(self, arrival: Arrival) -> None:
        assert arrival.timer is not None
        arrival.timer.cancel()
        arrival.timer = None
        self._admission.unhold(self._origin, arrival.call)
        sequence = arrival.call.place.sequence
        held = self._held[sequence]
        held.remove(arrival)
        if not held:
            del self._held[sequence]

    def _take_held(self) -> list[Arrival]:
        taken = [arrival for held in self._held.values() for arrival in held]
        for arrival in taken:
            self._unhold(arrival)
        return taken

    def _admit_held(self) -> None:
        while held := self._held.get(self.next_sequence):
            arrivals = held.copy()
            for arrival in arrivals:
                self._unhold(arrival)
            for arrival in arrivals:
                try:
                    self._place(arrival)
                except MintError as error:
                    arrival.fail(error)


def _fail(reply: asyncio.Future[Reply], error: MintError) -> None:
    if not reply.done():
        reply.set_exception(error)

"""The order of a run's calls: early arrivals wait, repeats get the same answer, a number acts once.

All state of that promise is here: `_admit` is where a call is accepted, `record` where it gets its
outcome, `release` where that is told, once the journal has it on disk.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from mint_core.errors import InvalidRequest, MintError
from mint_core.rpc.limits import MAX_CALLS_IN_FLIGHT_PER_RUN
from trainer_service.errors import (
    AnswerAcknowledged,
    AnswersUnacknowledged,
    SequenceGap,
    SequenceReused,
    TooManyCallsInFlight,
    WriterFenced,
)
from trainer_service.run.calls import Call, Outcome, Place, Refused, size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLimits:
    """Of one run."""

    held_calls: int = 64
    gap_s: float = 60.0  # how long an early arrival is held
    calls_in_flight: int = MAX_CALLS_IN_FLIGHT_PER_RUN
    kept_answers: int = 1024  # answers that are not acknowledged, those to come included
    kept_bytes: int = 64 * 1024 * 1024


@dataclass(slots=True, eq=False)
class Arrival:
    """A call as one RPC brought it. `outcome` is that RPC's own: to cancel it cancels no more."""

    call: Call
    outcome: asyncio.Future[Outcome]
    timer: asyncio.TimerHandle | None = None  # while it is held

    def fail(self, error: MintError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


@dataclass(slots=True, eq=False)
class _Entry:
    """An accepted number."""

    payload_hash: bytes
    waiting: list[Arrival] = field(default_factory=list)
    outcome: Outcome | None = None
    released: bool = False  # whether the outcome may be told


@dataclass(frozen=True, slots=True)
class PastNumber:
    """A number that was accepted before a restart."""

    sequence: int
    payload_hash: bytes
    outcome: Outcome | None  # None: it is still to come


class Sequence:
    """The numbers of one run. All methods belong to one event loop and return at once."""

    def __init__(
        self,
        accept: Callable[[Call], None],  # called once per number, in order
        limits: SequenceLimits,
        refusal: Callable[[int], MintError | None] = lambda calls_before: None,
        on_acknowledged: Callable[[int, int], None] = lambda before, upto: None,
    ) -> None:
        """`refusal`: why no call is accepted now, if so; told how many of the run come before.
        `on_acknowledged`: told that answers behind one number, up to another, are dropped.
        """
        self._accept = accept
        self._limits = limits
        self._refusal = refusal
        self._on_acknowledged = on_acknowledged
        self._entries: dict[int, _Entry] = {}  # accepted and not acknowledged
        self._held: dict[int, list[Arrival]] = {}
        self._kept_bytes = 0
        self._in_flight = 0
        self.acknowledged = 0
        self._answered = 0  # all numbers up to here are
        self.next_sequence = 1
        self.writer_epoch = 1

    @property
    def in_flight(self) -> int:
        """Calls accepted and not answered."""
        return self._in_flight

    def arrive(self, call: Call) -> Arrival:
        """Takes a call that an RPC brought. Raises refusals that are known at once.

        Later ones, which use up nothing either, and the outcome come through the arrival.
        """
        arrival = Arrival(call, asyncio.get_running_loop().create_future())
        self._place(arrival)
        self._admit_held()
        return arrival

    def leave(self, arrival: Arrival) -> None:
        """Forgets an RPC that has ended. An early arrival goes too; an accepted call goes on."""
        if arrival.timer is not None:
            self._unhold(arrival)

    def record(self, sequence: int, outcome: Outcome) -> None:
        """Gives an accepted number its outcome, which nobody is told yet."""
        entry = self._entries[sequence]
        assert entry.outcome is None, f"sequence {sequence} ended twice"
        entry.outcome = outcome
        self._kept_bytes += size_bytes(outcome)

    def release(self, sequence: int) -> None:
        """Answers all who wait for a number, and will ask for it."""
        entry = self._entries[sequence]
        assert entry.outcome is not None, f"sequence {sequence} has no outcome to tell"
        entry.released = True
        self._in_flight -= 1
        while self._is_released(self._answered + 1):
            self._answered += 1
        for arrival in entry.waiting:
            if not arrival.outcome.done():
                arrival.outcome.set_result(entry.outcome)
        entry.waiting.clear()

    def _is_released(self, sequence: int) -> bool:
        entry = self._entries.get(sequence)
        return entry is not None and entry.released

    def resume(self, acknowledged: int, writer_epoch: int, past: Iterable[PastNumber]) -> None:
        """Goes on behind the numbers of before a restart, given in order."""
        self.acknowledged = self._answered = acknowledged
        self.writer_epoch = writer_epoch
        self.next_sequence = acknowledged + 1
        for number in past:
            assert number.sequence == self.next_sequence, "the journal has a gap"
            self.next_sequence += 1
            self._entries[number.sequence] = _Entry(number.payload_hash)
            self._in_flight += 1
            if number.outcome is not None:
                self.record(number.sequence, number.outcome)
                self.release(number.sequence)

    def abandon(self, error: MintError) -> None:
        """Fails all who wait: no outcome will be told any more."""
        for entry in self._entries.values():
            for arrival in entry.waiting:
                arrival.fail(error)
            entry.waiting.clear()
        self.close(error)

    def open(self) -> int:
        """Starts a new epoch: early arrivals are dropped and calls of older epochs fenced."""
        self.writer_epoch += 1
        for arrival in self._take_held():
            arrival.fail(WriterFenced(arrival.call.place.writer_epoch, self.writer_epoch))
        return self.writer_epoch

    def close(self, error: MintError) -> None:
        """Drops early arrivals; the run is gone."""
        for arrival in self._take_held():
            arrival.fail(error)

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
            raise WriterFenced(place.writer_epoch, self.writer_epoch)
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
            error = InvalidRequest(
                f"`acknowledged_sequence` is {acknowledged} but only calls up to {self._answered} "
                "are answered; "
                "acknowledge only answers that have arrived",
                field="acknowledged_sequence",
                acknowledged_sequence=acknowledged,
                answered=self._answered,
            )
            if place.sequence < self.next_sequence:
                raise error  # the number has its outcome
            arrival.call = replace(arrival.call, work=Refused(error))
            return
        if acknowledged <= self.acknowledged:
            return
        for sequence in range(self.acknowledged + 1, acknowledged + 1):
            outcome = self._entries.pop(sequence).outcome
            assert outcome is not None
            self._kept_bytes -= size_bytes(outcome)
        self._on_acknowledged(self.acknowledged, acknowledged)
        self.acknowledged = acknowledged

    def _repeat(self, arrival: Arrival) -> None:
        place = arrival.call.place
        if place.sequence <= self.acknowledged:
            raise AnswerAcknowledged(place.sequence, self.acknowledged)
        entry = self._entries[place.sequence]
        if entry.payload_hash != place.payload_hash:
            raise SequenceReused(place.sequence)
        if entry.outcome is not None and entry.released:
            arrival.outcome.set_result(entry.outcome)
        else:
            entry.waiting.append(arrival)

    def _admit(self, arrival: Arrival) -> None:
        place = arrival.call.place
        if error := self._full(place.sequence):
            # A refused number has no successors: they would only wait in vain.
            for later in self._take_held():
                later.fail(self._full(later.call.place.sequence) or error)
            raise error
        self._entries[place.sequence] = _Entry(place.payload_hash, [arrival])
        self.next_sequence += 1
        self._in_flight += 1
        self._accept(arrival.call)

    def _full(self, sequence: int) -> MintError | None:
        limits = self._limits
        if self._in_flight >= limits.calls_in_flight:
            return TooManyCallsInFlight(limits.calls_in_flight)
        if len(self._entries) >= limits.kept_answers or self._kept_bytes >= limits.kept_bytes:
            return AnswersUnacknowledged(len(self._entries), self._kept_bytes)
        return self._refusal(sequence - self.next_sequence)

    def _hold(self, arrival: Arrival) -> None:
        sequence = arrival.call.place.sequence
        if error := self._full(sequence):
            raise error  # as the number before it is, or would be
        if sum(map(len, self._held.values())) >= self._limits.held_calls:
            raise SequenceGap(sequence, self.next_sequence)
        loop = asyncio.get_running_loop()
        arrival.timer = loop.call_later(self._limits.gap_s, self._give_up, arrival)
        self._held.setdefault(sequence, []).append(arrival)

    def _give_up(self, arrival: Arrival) -> None:
        self._unhold(arrival)
        arrival.fail(SequenceGap(arrival.call.place.sequence, self.next_sequence))

    def _unhold(self, arrival: Arrival) -> None:
        assert arrival.timer is not None
        arrival.timer.cancel()
        arrival.timer = None
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

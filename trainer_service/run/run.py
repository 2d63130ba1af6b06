"""One training run as the front knows it: what its calls and its end mean for it, at once."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mint_core.errors import MintError, TrainingRunNotFound
from trainer_service.calls import Call, Outcome, Reply
from trainer_service.errors import TrainingRunLost
from trainer_service.groups.group import Group
from trainer_service.journal.run_journal import RunJournal
from trainer_service.journal.writer import RecordRefused, Written
from trainer_service.queue.admission import Admission
from trainer_service.run.call_numbers import Arrival, CallLimits, CallNumbers
from trainer_service.run.inbox import Inbox
from trainer_service.run.retention import Retention
from trainer_service.run_description import Gradient, RunOrigin, RunState, RunView


@dataclass(slots=True)
class UnsavedWork:
    """How much of a run would have to be computed again after a crash: what has come since its row
    was saved last.
    """

    calls: int = 0  # that have changed the row
    seconds: float = 0.0  # of the engine, this run's share
    backlog_bytes: int = 0  # of backwards since the last step: a step needs all of them
    changed_s: float = field(default_factory=time.monotonic)  # when the row last was

    def change(self, size_bytes: int, *, stepped: bool) -> None:
        """Notes a call that has changed the row."""
        self.calls += 1
        self.backlog_bytes = 0 if stepped else self.backlog_bytes + size_bytes
        self.changed_s = time.monotonic()

    def add(self, other: "UnsavedWork") -> None:
        """Takes back what a row that could not be saved would have covered."""
        self.calls += other.calls
        self.seconds += other.seconds
        self.backlog_bytes += other.backlog_bytes


@dataclass(slots=True, eq=False)
class Destination:
    """Where a run is to go when it is next at rest."""

    group: Group
    done: asyncio.Future[None] = field(  # it is there, or will not be
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Watcher(Protocol):
    """Is told what happens to a run, at once and briefly."""

    def stir(self) -> None: ...

    def call_ended(self, call: Call, outcome: Outcome) -> None: ...

    def end(self, error: MintError | None) -> None: ...


class Run:
    """A run's state, and the one place that decides what becomes of a call that arrives: `arrive`,
    `open`, `abandon` act at once. Its loop empties the inbox; its weights, gradient and moments are
    in the engine. All methods belong to one event loop.
    """

    def __init__(
        self,
        origin: RunOrigin,
        state: RunState,
        *,
        metadata: Mapping[str, str],
        retention: Retention,
        journal: RunJournal,
        admission: Admission,
        limits: CallLimits,
        group: Group,
    ) -> None:
        self.origin = origin
        self._state = state  # but for what the numbers keep
        self.metadata = metadata
        self.retention = retention
        self.journal = journal
        self._admission = admission
        self.unsaved = UnsavedWork()
        self.numbers = CallNumbers(self, limits, admission, origin)
        self.inbox = Inbox()
        self.watched: Watcher | None = None  # by whom, for those who watch it or have lately
        self.group = group
        self.placed = False  # whether it was decided that this is its group
        self.destination: Destination | None = None
        self.row_life = 0  # of the group's engine that has the row as it should be; 0: none has
        self.ended = 0  # sequence of the last call that has an outcome
        self.closing = False  # it is being deleted, or is gone
        self._unanswered: dict[int, Call] = {}
        self._lost = ""
        self._given_up: MintError | None = None  # its calls are not even taken

    @property
    def id(self) -> str:
        return self.origin.training_run_id

    @property
    def has_row(self) -> bool:
        """Whether an engine has the row as it should be."""
        return self.row_life == self.group.scheduler.life

    @property
    def lost(self) -> bool:
        """Whether the row cannot be restored."""
        return bool(self._lost)

    @property
    def state(self) -> RunState:
        numbers = self.numbers
        return self._state._replace(
            writer_epoch=numbers.writer_epoch,
            acknowledged=numbers.acknowledged,
            dropped=numbers.dropped,
        )

    def check_usable(self) -> None:
        """Raises if the run is gone, or cannot be restored."""
        if self.closing:
            raise TrainingRunNotFound(self.id)
        if self._lost:
            raise TrainingRunLost(self.id, self._lost)

    # What comes from outside

    def arrive(self, call: Call) -> Arrival:
        """Takes a call that an RPC brought: it is accepted, held, a repeat, or refused."""
        if self.closing:
            raise TrainingRunNotFound(self.id)
        if self._given_up is not None:
            raise self._given_up
        return self.numbers.arrive(call)

    def accept(self, call: Call) -> None:
        """See Intake."""
        call.course.noted = self._note(self.journal.accepted(call))
        self.begin(call)

    def begin(self, call: Call) -> None:
        """Has a call that the journal knows executed."""
        self._admission.enter(self.origin, call)
        self._unanswered[call.place.sequence] = call
        self.inbox.put(call)

    def drop(self, before: int, upto: int) -> None:
        """See Intake."""
        self._note(self.journal.dropped(before, upto, self.state))

    def open(self) -> int:
        """Fences earlier writers, and returns the new epoch."""
        epoch = self.numbers.open()
        self._note(self.journal.changed(self.state))
        return epoch

    def abandon(self, error: MintError) -> None:
        """Ends the run for its callers: who waits is told `error`, and nobody anything else."""
        self.numbers.abandon(error)
        self.inbox.abandon(error)
        for call in list(self._unanswered.values()):
            self._leave(call)

    async def move_to(self, group: Group) -> bool:
        """Has the run go to a group when it is next at rest. Returns whether it is there."""
        if self.destination is None:
            self.destination = Destination(group)
            self.inbox.stir()
        await asyncio.wait([self.destination.done])
        return self.group is group

    # What becomes of its calls

    def settle(self, call: Call, outcome: Outcome) -> "asyncio.Future[Reply]":
        """Makes an outcome that of its call. It is on disk, and may be told, when the future is
        done.
        """
        sequence, failed = call.place.sequence, outcome.error is not None
        gradient = self._state.gradient
        match call.method:
            case "ForwardBackward" if failed:
                gradient = gradient.without(sequence)
            case "ForwardBackward":
                gradient = gradient.with_one_more()
            case "OptimStep":
                gradient = Gradient()
            case "DiscardGradient" | "LoadState" if not failed:
                gradient = Gradient()
        step = self._state.step if outcome.step is None else outcome.step
        self._state = self._state._replace(step=step, gradient=gradient, update_time_s=time.time())
        self.ended = max(self.ended, sequence)
        self.retention.touch()
        return self._note(self.journal.ended(call, outcome, self.state))

    def answer(self, call: Call, outcome: Outcome, reply: Reply) -> None:
        """Tells an outcome that is on disk."""
        self._leave(call)
        self.numbers.answer(call.place.sequence, reply)
        if self.watched:
            self.watched.call_ended(call, outcome)

    def note_death(self, call: Call) -> None:
        """Notes that an engine has died with a call."""
        call.course.deaths += 1
        self._note(self.journal.died(call))

    def lose(self, why: str) -> None:
        """Notes that the run's row cannot be restored."""
        self._lost = self._lost or why
        self.stir_watchers()

    def give_up(self, why: str) -> None:
        """Takes no more calls, until the next start: what is said of them could not be kept."""
        self.lose(why)
        self._given_up = TrainingRunLost(self.id, why)
        self.abandon(self._given_up)

    def replayed_inexactly(self, note: str) -> None:
        """Notes that a restored row is not to the bit what it was."""
        replays = self._state.inexact_replays + 1
        self._state = self._state._replace(inexact_replays=replays, inexact_note=note)
        self._note(self.journal.changed(self.state))
        self.stir_watchers()

    def _leave(self, call: Call) -> None:
        if self._unanswered.pop(call.place.sequence, None):
            self._admission.leave(self.origin, call)

    def _note(self, written: Written) -> Written:
        """Has the run alone suffer if the journal refuses what was to be noted of it."""
        written.add_done_callback(self._check_noted)
        return written

    def _check_noted(self, written: Written) -> None:
        if not written.cancelled() and isinstance(written.exception(), RecordRefused):
            self.give_up("the journal refuses what was to be noted of it: the log says why")

    # What is seen of it

    def stir_watchers(self) -> None:
        """Notes that something has changed which is seen from outside."""
        if self.watched:
            self.watched.stir()

    def end_watches(self, error: MintError | None = None) -> None:
        """Ends all watches: the run is gone, or `error` says why."""
        if self.watched:
            self.watched.end(error)

    @property
    def abandoned(self) -> bool:
        """Whether it may be deleted because nobody has called or watched it for long."""
        return self.retention.over and not self.numbers.in_flight and not self.watched

    def view(self) -> RunView:
        return RunView(
            origin=self.origin,
            metadata=self.metadata,
            state=self.state,
            next_sequence=self.numbers.next_sequence,
            lost=self._lost,
            group=self.group.name if self.placed else "",
        )

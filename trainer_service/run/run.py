"""One training run as the front knows it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from mint_core.errors import MintError, TrainingRunNotFound
from mint_core.lora.spec import AdapterSpec
from trainer_service.errors import TrainingRunLost
from trainer_service.run.call_numbers import Sequence as Numbers
from trainer_service.run.call_numbers import SequenceLimits
from trainer_service.run.calls import Call, Loaded, Outcome, Stepped
from trainer_service.run.exposure import Exposure
from trainer_service.run.gradient import Gradient, GradientCounts
from trainer_service.run.presence import Presence
from trainer_service.run.retention import Retention
from trainer_service.run.turns import Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrigin:
    """What never changes of a run."""

    training_run_id: str
    tenant: str
    number: int  # of creation, ascending
    base_model: str
    base_fingerprint: str
    spec: AdapterSpec
    trainable_parameter_count: int
    row_bytes: int  # of the weights as they lie in memory
    create_time: datetime
    isolated: bool
    tile_tokens: int  # at which its calls are cut, whatever memory a later engine finds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What changes of a run, as the journal keeps it."""

    step: int = 0
    writer_epoch: int = 1
    acknowledged: int = 0
    gradient: GradientCounts = field(default_factory=GradientCounts)
    update_time_s: float  # since the epoch
    inexact_replays: int = 0
    inexact_note: str = ""  # of the last of them


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run at one moment, for answers."""

    origin: RunOrigin
    metadata: Mapping[str, str]
    update_time: datetime
    step: int
    next_sequence: int
    writer_epoch: int
    gradient_pending: bool
    backward_count: int
    lost: str  # why; empty while the run can be used
    trouble: str  # what else is wrong; empty: nothing
    inexact_replays: int = 0
    inexact_note: str = ""


class Watcher(Protocol):
    """Is told what happens to a run, at once and briefly."""

    def stir(self) -> None: ...

    def call_ended(self, call: Call, outcome: Outcome) -> None: ...

    def end(self, error: MintError | None) -> None: ...


@dataclass(frozen=True, slots=True)
class RunHooks:
    """What a run asks and tells those around it."""

    accept: Callable[["Run", Call], None]
    acknowledge: Callable[["Run", int, int], None]  # answers behind one number up to another
    refusal: Callable[[RunOrigin, int], MintError | None]  # told the calls of the run before


class Run:
    """A run's state. Its weights, gradient and moments are in the engine."""

    def __init__(
        self,
        origin: RunOrigin,
        state: RunState,
        *,
        metadata: Mapping[str, str],
        hooks: RunHooks,
        limits: SequenceLimits,
        retention: Retention,
    ) -> None:
        self.origin = origin
        self.step = state.step
        self.metadata = metadata
        self.update_time = datetime.fromtimestamp(state.update_time_s, UTC)
        self.retention = retention
        self.gradient = Gradient(state.gradient)
        self.turns = Turns()
        self.watchers: set[Watcher] = set()
        self.presence = Presence()
        self.exposure = Exposure()
        self.sequence = Numbers(
            lambda call: hooks.accept(self, call),
            limits,
            partial(hooks.refusal, origin),
            lambda before, upto: hooks.acknowledge(self, before, upto),
        )
        self.inexact_replays = state.inexact_replays
        self.inexact_note = state.inexact_note
        self.ended = 0  # sequence of the last call that has an outcome
        self.trouble = ""
        self._lost = ""
        self._deleted = False

    @property
    def id(self) -> str:
        return self.origin.training_run_id

    def check_usable(self) -> None:
        """Raises if the run is gone, or cannot be restored."""
        if self._deleted:
            raise TrainingRunNotFound(self.id)
        if self._lost:
            raise TrainingRunLost(self.id, self._lost)

    @property
    def deleted(self) -> bool:
        return self._deleted

    def lose(self, why: str) -> None:
        """Notes that the run's row cannot be restored."""
        self._lost = self._lost or why
        self.stir_watchers()

    def replayed_inexactly(self, note: str) -> None:
        """Notes that a restored row is not to the bit what it was."""
        self.inexact_replays += 1
        self.inexact_note = note
        self.stir_watchers()

    def delete(self) -> None:
        """Fails calls that have not started; early arrivals are dropped."""
        self._deleted = True
        self.sequence.close(TrainingRunNotFound(self.id))

    def stir_watchers(self) -> None:
        """Notes that something has changed which is seen from outside."""
        for watcher in self.watchers:
            watcher.stir()

    def settle(self, call: Call, outcome: Outcome) -> None:
        """Makes an outcome that of its call. It is answered once it is on disk."""
        sequence, failed = call.place.sequence, isinstance(outcome, MintError)
        match call.method:
            case "ForwardBackward" if failed:
                self.gradient.fail(sequence)
            case "ForwardBackward":
                self.gradient.add()
            case "OptimStep":
                self.gradient.clear()
            case "DiscardGradient" | "LoadState" if not failed:
                self.gradient.clear()
        if isinstance(outcome, Stepped | Loaded):
            self.step = outcome.step
        self.ended = max(self.ended, sequence)
        self.touch()
        self.sequence.record(sequence, outcome)

    def answer(self, call: Call, outcome: Outcome) -> None:
        """Tells an outcome that is on disk."""
        self.sequence.release(call.place.sequence)
        for watcher in self.watchers:
            watcher.call_ended(call, outcome)

    def end_watches(self, error: MintError | None = None) -> None:
        """Ends all watches: the run is gone, or `error` says why."""
        for watcher in self.watchers:
            watcher.end(error)

    @property
    def abandoned(self) -> bool:
        """Whether it may be deleted because nobody has called or watched it for long."""
        return self.retention.over and not self.sequence.in_flight and not self.watchers

    def touch(self) -> None:
        """Notes that a call has ended."""
        self.retention.touch()
        self.update_time = datetime.now(UTC)

    def state(self) -> RunState:
        return RunState(
            step=self.step,
            writer_epoch=self.sequence.writer_epoch,
            acknowledged=self.sequence.acknowledged,
            gradient=self.gradient.counts,
            update_time_s=self.update_time.timestamp(),
            inexact_replays=self.inexact_replays,
            inexact_note=self.inexact_note,
        )

    def view(self) -> RunView:
        return RunView(
            origin=self.origin,
            metadata=self.metadata,
            update_time=self.update_time,
            step=self.step,
            next_sequence=self.sequence.next_sequence,
            writer_epoch=self.sequence.writer_epoch,
            gradient_pending=self.gradient.pending,
            backward_count=self.gradient.backward_count,
            lost=self._lost,
            trouble=self.trouble,
            inexact_replays=self.inexact_replays,
            inexact_note=self.inexact_note,
        )

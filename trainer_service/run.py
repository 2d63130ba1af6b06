"""One training run as the front knows it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from mint_core.errors import MintError, TrainingRunNotFound
from mint_core.lora.spec import AdapterSpec
from trainer_service.calls import Call, Outcome
from trainer_service.errors import TrainingRunLost
from trainer_service.gradient import Gradient
from trainer_service.retention import Retention
from trainer_service.sequencing import Sequence, SequenceLimits
from trainer_service.turns import Turns


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


class Watcher(Protocol):
    """Is told what happens to a run, at once and briefly."""

    def stir(self) -> None: ...

    def call_ended(self, call: Call, outcome: Outcome) -> None: ...

    def end(self, error: MintError | None) -> None: ...


class Run:
    """A run's state. Its weights, gradient and moments are in the engine."""

    def __init__(
        self,
        origin: RunOrigin,
        *,
        step: int,
        metadata: Mapping[str, str],
        accept: Callable[["Run", Call], None],
        limits: SequenceLimits,
        refusal: Callable[[RunOrigin, int], MintError | None],
        retention: Retention,
    ) -> None:
        self.origin = origin
        self.step = step
        self.metadata = metadata
        self.update_time = origin.create_time
        self.retention = retention
        self.gradient = Gradient()
        self.turns = Turns()
        self.watchers: set[Watcher] = set()
        self.sequence = Sequence(lambda call: accept(self, call), limits, partial(refusal, origin))
        self.trouble = ""
        self._lost = ""
        self._deleted = False

    @property
    def id(self) -> str:
        return self.origin.training_run_id

    def check_usable(self) -> None:
        """Raises unless the engine has the run's row."""
        if self._deleted:
            raise TrainingRunNotFound(self.id)
        if self._lost:
            raise TrainingRunLost(self.id, self._lost)

    def lose(self, why: str) -> None:
        """Notes that the engine with the run's row died."""
        self._lost = self._lost or why
        self.stir_watchers()

    def delete(self) -> None:
        """Fails calls that have not started; early arrivals are dropped."""
        self._deleted = True
        self.sequence.close(TrainingRunNotFound(self.id))

    def stir_watchers(self) -> None:
        """Notes that something has changed which is seen from outside."""
        for watcher in self.watchers:
            watcher.stir()

    def end(self, call: Call, outcome: Outcome) -> None:
        """Makes the outcome of a call final."""
        self.touch()
        self.sequence.record(call.place.sequence, outcome)
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
        )

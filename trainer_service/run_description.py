"""What is known of a run: what never changes, what the journal keeps, what callers are shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from mint_core.errors import MintError
from mint_core.lora.spec import AdapterSpec
from trainer_service.errors import BackwardCountMismatch, GradientIncomplete, NoGradient


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrigin:
    """What never changes of a run."""

    training_run_id: str
    tenant: str
    number: int  # of creation, ascending; no number is given twice
    base_model: str
    base_fingerprint: str
    spec: AdapterSpec
    trainable_parameter_count: int
    row_bytes: int  # of the weights as they lie in memory
    create_time: datetime
    isolated: bool
    tile_tokens: int  # at which its calls are cut, whatever memory a later engine finds

    @property
    def whole_row_bytes(self) -> int:
        """Of weights, gradient and two moments."""
        return 4 * self.row_bytes


class Gradient(NamedTuple):
    """What has gone into a row's gradient since the last step, discard or load. No step is ever
    taken on part of a batch.
    """

    backward_count: int = 0  # those that failed included
    added: int = 0
    failed_sequence: int | None = None  # of the first that failed

    @property
    def pending(self) -> bool:
        """Whether a batch's gradient has accumulated; that of zero weights is one too."""
        return self.added > 0

    @property
    def touched(self) -> bool:
        """Whether the row may hold something: a failed backward may have added some tiles."""
        return self.backward_count > 0

    def with_one_more(self) -> "Gradient":
        """With a backward that is in the sum."""
        return self._replace(backward_count=self.backward_count + 1, added=self.added + 1)

    def without(self, sequence: int) -> "Gradient":
        """After a backward that is not in it, or not whole: it is incomplete from now on."""
        first = min(self.failed_sequence or sequence, sequence)
        return self._replace(backward_count=self.backward_count + 1, failed_sequence=first)

    def refusal(self, backward_count: int | None) -> MintError | None:
        """Why no step may be taken, if so."""
        if self.failed_sequence is not None:
            return GradientIncomplete(self.failed_sequence)
        if backward_count is not None and backward_count != self.backward_count:
            return BackwardCountMismatch(backward_count, self.backward_count)
        return None if self.pending else NoGradient()


class RunState(NamedTuple):
    """What changes of a run, in the order in which the journal keeps it."""

    step: int = 0
    writer_epoch: int = 1
    acknowledged: int = 0
    gradient: Gradient = Gradient()
    update_time_s: float = 0.0  # since the epoch
    inexact_replays: int = 0
    inexact_note: str = ""  # of the last of them
    dropped: int = 0  # answers up to here are gone, whether they were acknowledged or not


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run at one moment, for answers."""

    origin: RunOrigin
    metadata: Mapping[str, str]
    state: RunState
    next_sequence: int
    lost: str  # why; empty while the run can be used
    group: str = ""  # empty: it has not been called since the server was started
    trouble: str = ""  # what else is wrong; empty: nothing

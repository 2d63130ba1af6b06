"""The rules of a run's gradient: no step is ever taken on part of a batch."""

from dataclasses import dataclass, replace

from mint_core.errors import MintError
from trainer_service.errors import BackwardCountMismatch, GradientIncomplete, NoGradient


@dataclass(frozen=True, slots=True)
class GradientCounts:
    """What has gone into a gradient since the last step, discard or load."""

    backward_count: int = 0  # those that failed included
    added: int = 0
    failed_sequence: int | None = None  # of the first that failed


class Gradient:
    """The front's side of a row's gradient."""

    def __init__(self, counts: GradientCounts | None = None) -> None:
        self.counts = counts or GradientCounts()

    @property
    def backward_count(self) -> int:
        return self.counts.backward_count

    @property
    def pending(self) -> bool:
        """Whether a batch's gradient has accumulated; that of zero weights is one too."""
        return self.counts.added > 0

    @property
    def touched(self) -> bool:
        """Whether the row may hold something: a failed backward may have added some tiles."""
        return self.counts.backward_count > 0

    def add(self) -> None:
        """Notes a backward that is in the sum."""
        counts = self.counts
        self.counts = replace(
            counts, backward_count=counts.backward_count + 1, added=counts.added + 1
        )

    def fail(self, sequence: int) -> None:
        """Notes a backward that is not, or not whole: the sum is incomplete from now on."""
        counts = self.counts
        first = min(counts.failed_sequence or sequence, sequence)
        self.counts = replace(
            counts, backward_count=counts.backward_count + 1, failed_sequence=first
        )

    def refusal(self, backward_count: int | None) -> MintError | None:
        """Why no step may be taken, if so."""
        if self.counts.failed_sequence is not None:
            return GradientIncomplete(self.counts.failed_sequence)
        if backward_count is not None and backward_count != self.backward_count:
            return BackwardCountMismatch(backward_count, self.backward_count)
        return None if self.pending else NoGradient()

    def clear(self) -> None:
        """Starts anew, after a step that was taken or refused, a discard or a load."""
        self.counts = GradientCounts()

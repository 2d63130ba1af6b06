"""The rules of a run's gradient: no step is ever taken on part of a batch."""

from dataclasses import dataclass, replace

from mint_core.errors import MintError
from trainer_service.errors import BackwardCountMismatch, GradientIncomplete, NoGradient


@dataclass(frozen=True, slots=True)
class Gradient:
    """What has gone into a row's gradient since the last step, discard or load."""

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
        return replace(self, backward_count=self.backward_count + 1, added=self.added + 1)

    def without(self, sequence: int) -> "Gradient":
        """After a backward that is not in it, or not whole: it is incomplete from now on."""
        first = min(self.failed_sequence or sequence, sequence)
        return replace(self, backward_count=self.backward_count + 1, failed_sequence=first)

    def refusal(self, backward_count: int | None) -> MintError | None:
        """Why no step may be taken, if so."""
        if self.failed_sequence is not None:
            return GradientIncomplete(self.failed_sequence)
        if backward_count is not None and backward_count != self.backward_count:
            return BackwardCountMismatch(backward_count, self.backward_count)
        return None if self.pending else NoGradient()

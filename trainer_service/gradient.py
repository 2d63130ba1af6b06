"""The rules of a run's gradient: no step is ever taken on part of a batch."""

from mint_core.errors import MintError
from trainer_service.errors import BackwardCountMismatch, GradientIncomplete, NoGradient


class Gradient:
    """What has gone into the gradient since the last step, discard or load."""

    def __init__(self) -> None:
        self.backward_count = 0  # those that failed included
        self._added = 0
        self._failed_sequence: int | None = None

    @property
    def pending(self) -> bool:
        """Whether a batch's gradient has accumulated; that of zero weights is one too."""
        return self._added > 0

    @property
    def touched(self) -> bool:
        """Whether the row may hold something: a failed backward may have added some tiles."""
        return self.backward_count > 0

    def add(self) -> None:
        """Notes a backward that is in the sum."""
        self.backward_count += 1
        self._added += 1

    def fail(self, sequence: int) -> None:
        """Notes a backward that is not, or not whole: the sum is incomplete from now on."""
        self.backward_count += 1
        if self._failed_sequence is None or sequence < self._failed_sequence:
            self._failed_sequence = sequence

    def refusal(self, backward_count: int | None) -> MintError | None:
        """Why no step may be taken, if so."""
        if self._failed_sequence is not None:
            return GradientIncomplete(self._failed_sequence)
        if backward_count is not None and backward_count != self.backward_count:
            return BackwardCountMismatch(backward_count, self.backward_count)
        return None if self.pending else NoGradient()

    def clear(self) -> None:
        """Starts anew, after a step that was taken or refused, a discard or a load."""
        self.backward_count = 0
        self._added = 0
        self._failed_sequence = None

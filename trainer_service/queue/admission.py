"""Whether anything new is accepted, and what was and waits."""

from prometheus_client import Gauge

from mint_core.errors import MintError, Unavailable
from trainer_service.journal.writer import Journal
from trainer_service.queue.backlog import Backlogs
from trainer_service.recovery.state_size import StateSize
from trainer_service.run.calls import Call
from trainer_service.run.description import RunOrigin


class Admission:
    """One answer for all who ask. All methods belong to one event loop."""

    def __init__(
        self, journal: Journal, size: StateSize, backlogs: Backlogs, queue_depth: Gauge
    ) -> None:
        self._journal = journal
        self._size = size
        self._backlogs = backlogs
        self._queue_depth = queue_depth
        self.draining: Unavailable | None = None  # set when the service ends

    def refusal(self) -> MintError | None:
        """Why nothing that makes the state grow is accepted now, if so."""
        return self.draining or self._journal.trouble() or self._size.refusal()

    def call_refusal(self, origin: RunOrigin, calls_before: int) -> MintError | None:
        """Why a run's call is not accepted now, if so; so many of the run come before it."""
        return self.refusal() or self._backlogs.refusal(origin, calls_before)

    def check_changes(self) -> None:
        """Raises if no request that changes something is accepted now."""
        if error := self.draining or self._journal.trouble():
            raise error

    def check_answers(self) -> None:
        """Raises if nothing can be promised any more, old or new."""
        if self._journal.failure is not None:
            raise self._journal.failure

    def enter(self, origin: RunOrigin, call: Call) -> None:
        """Notes an accepted call of a run."""
        self._queue_depth.inc()
        self._backlogs.enter(origin, call)

    def leave(self, origin: RunOrigin, call: Call) -> None:
        """Notes that the call is answered, or will not be."""
        self._queue_depth.dec()
        self._backlogs.leave(origin, call)

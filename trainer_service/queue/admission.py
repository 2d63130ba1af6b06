"""Whether anything new is accepted, and what was and waits: of each tenant, or of each run."""

from collections import Counter
from collections.abc import Callable

from prometheus_client import Gauge

from mint_core.backlog import Backlog, Load, retry_after_s
from mint_core.errors import MintError, Unavailable
from trainer_service.calls import Call
from trainer_service.errors import EarlyArrivalsFull, QueueFull
from trainer_service.journal.state_size import StateSize
from trainer_service.journal.writer import Journal
from trainer_service.run_description import RunOrigin

HELD_BYTES = 256 * 2**20  # of one tenant's early arrivals

# Says when a run, alone or with all others of its tenant, will have had so many more tokens
# computed, in seconds.
Predict = Callable[[RunOrigin, bool, int], float]


class Admission:
    """One answer for all who ask. What waits is bounded by tenant; by run where all callers are one
    tenant. All methods belong to one event loop.
    """

    def __init__(
        self,
        journal: Journal,
        size: StateSize,
        queue_depth: Gauge,
        limit: Load,  # of calls and their tokens, about 30 bytes of the front's memory each
        *,
        per_run: bool,
        predict: Predict,
    ) -> None:
        self._journal = journal
        self._size = size
        self._queue_depth = queue_depth
        self._backlog = Backlog(limit)
        self._per_run = per_run
        self._held_bytes: Counter[str] = Counter()  # of early arrivals, by tenant
        self._predict = predict
        self.draining: Unavailable | None = None  # set when the service ends

    def refusal(self) -> MintError | None:
        """Why nothing that makes the state grow is accepted now, if so."""
        return self.draining or self._journal.trouble() or self._size.refusal()

    def call_refusal(self, origin: RunOrigin, calls_before: int) -> MintError | None:
        """Why a run's call is not accepted now, if so, and when to send it again.

        `calls_before` of the same run wait to be accepted too.
        """
        key = self._key(origin)
        if (error := self.refusal()) or not self._backlog.is_full(key):
            return error
        held, limit = self._backlog.held(key), self._backlog.limit
        return QueueFull(
            calls=held.count,
            tokens=held.tokens,
            max_calls=limit.count,
            max_tokens=limit.tokens,
            retry_after_s=self._retry_after_s(origin, held, calls_before),
        )

    def check_changes(self) -> None:
        """Raises if no request that changes something is accepted now."""
        if error := self.draining or self._journal.trouble():
            raise error

    def check_answers(self) -> None:
        """Raises if nothing can be promised any more, old or new."""
        if self._journal.failure is not None:
            raise self._journal.failure

    def hold(self, origin: RunOrigin, call: Call) -> MintError | None:
        """Notes an early arrival, or says why there is no room for it: they may take a part of what
        requests may, so that those they wait for find room.
        """
        held, size_bytes = self._held_bytes[origin.tenant], len(call.payload)
        if held and held + size_bytes > HELD_BYTES:
            return EarlyArrivalsFull(held, HELD_BYTES)
        self._held_bytes[origin.tenant] += size_bytes
        return None

    def unhold(self, origin: RunOrigin, call: Call) -> None:
        self._held_bytes[origin.tenant] -= len(call.payload)
        if not self._held_bytes[origin.tenant]:
            del self._held_bytes[origin.tenant]

    def enter(self, origin: RunOrigin, call: Call) -> None:
        """Notes an accepted call of a run."""
        self._queue_depth.inc()
        self._backlog.enter(self._key(origin), Load(count=1, tokens=call.cost))

    def leave(self, origin: RunOrigin, call: Call) -> None:
        """Notes that the call is answered, or will not be."""
        self._queue_depth.dec()
        self._backlog.leave(self._key(origin), Load(count=1, tokens=call.cost))

    def _retry_after_s(self, origin: RunOrigin, held: Load, calls_before: int) -> float:
        """About when enough will be done: what is too much, and at least a call's worth of it."""
        call_tokens = held.tokens // held.count
        too_many = held.tokens - self._backlog.limit.tokens + 1
        tokens = max(too_many, call_tokens) + calls_before * call_tokens
        return retry_after_s(self._predict(origin, self._per_run, tokens))

    def _key(self, origin: RunOrigin) -> str:
        return origin.training_run_id if self._per_run else origin.tenant

"""Bounds on the calls that are accepted and not answered: of each tenant, or of each run."""

from collections.abc import Callable

from mint_core.backlog import Backlog, Load, retry_after_s
from trainer_service.errors import QueueFull
from trainer_service.run.calls import Call
from trainer_service.run.description import RunOrigin

# Says when a tenant, or one run of it, will have had so many more tokens computed, in seconds.
Predict = Callable[[str, str | None, int], float]


class Backlogs:
    """What waits, by tenant; by run where all callers are one tenant."""

    def __init__(
        self,
        limit: Load,  # of calls and their tokens, about 30 bytes of the front's memory each
        *,
        per_run: bool,
        predict: Predict,
    ) -> None:
        self._backlog = Backlog(limit)
        self._per_run = per_run
        self._predict = predict

    def enter(self, origin: RunOrigin, call: Call) -> None:
        """Notes an accepted call of a run."""
        self._backlog.enter(self._key(origin), _load(call))

    def leave(self, origin: RunOrigin, call: Call) -> None:
        """Notes that the call is answered."""
        self._backlog.leave(self._key(origin), _load(call))

    def refusal(self, origin: RunOrigin, calls_before: int) -> QueueFull | None:
        """Why a run's call is not accepted now, if so, and when to send it again.

        `calls_before` of the same run wait to be accepted too.
        """
        key = self._key(origin)
        if not self._backlog.is_full(key):
            return None
        held, limit = self._backlog.held(key), self._backlog.limit
        return QueueFull(
            calls=held.count,
            tokens=held.tokens,
            max_calls=limit.count,
            max_tokens=limit.tokens,
            retry_after_s=self._retry_after_s(origin, held, calls_before),
        )

    def _retry_after_s(self, origin: RunOrigin, held: Load, calls_before: int) -> float:
        """About when enough will be done: what is too much, and at least a call's worth of it."""
        call_tokens = held.tokens // held.count
        too_many = held.tokens - self._backlog.limit.tokens + 1
        tokens = max(too_many, call_tokens) + calls_before * call_tokens
        run = origin.training_run_id if self._per_run else None
        return retry_after_s(self._predict(origin.tenant, run, tokens))

    def _key(self, origin: RunOrigin) -> str:
        return origin.training_run_id if self._per_run else origin.tenant


def _load(call: Call) -> Load:
    return Load(count=1, tokens=call.tokens)

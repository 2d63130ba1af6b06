"""Bounds on the calls that are accepted and not answered: of each tenant, or of each run."""

from collections.abc import Callable
from dataclasses import dataclass

from trainer_service.calls import Call
from trainer_service.errors import QueueFull
from trainer_service.run import RunOrigin

SHORTEST_RETRY_S = 0.1
LONGEST_RETRY_S = 10.0
# Says when a tenant, or one run of it, will have had so many more tokens computed, in seconds.
Predict = Callable[[str, str | None, int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogLimits:
    """A call is accepted while less than this waits: one may go over, so that none is too large."""

    calls: int
    tokens: int  # of data; about 30 bytes of the front's memory each


@dataclass(slots=True)
class _Account:
    calls: int = 0
    tokens: int = 0


class Backlogs:
    """What waits, by tenant; by run where all callers are one tenant."""

    def __init__(self, limits: BacklogLimits, *, per_run: bool, predict: Predict) -> None:
        self._limits = limits
        self._per_run = per_run
        self._predict = predict
        self._accounts: dict[str, _Account] = {}  # those with calls

    def enter(self, origin: RunOrigin, call: Call) -> None:
        """Notes an accepted call of a run."""
        account = self._accounts.setdefault(self._key(origin), _Account())
        account.calls += 1
        account.tokens += call.tokens

    def leave(self, origin: RunOrigin, call: Call) -> None:
        """Notes that the call is answered."""
        key = self._key(origin)
        account = self._accounts[key]
        account.calls -= 1
        account.tokens -= call.tokens
        if not account.calls:
            del self._accounts[key]

    def refusal(self, origin: RunOrigin, calls_before: int) -> QueueFull | None:
        """Why a run's call is not accepted now, if so, and when to send it again.

        `calls_before` of the same run wait to be accepted too.
        """
        account = self._accounts.get(self._key(origin))
        if account is None:
            return None
        limits = self._limits
        if account.calls < limits.calls and account.tokens < limits.tokens:
            return None
        return QueueFull(
            calls=account.calls,
            tokens=account.tokens,
            max_calls=limits.calls,
            max_tokens=limits.tokens,
            retry_after_s=self._retry_after_s(origin, account, calls_before),
        )

    def _retry_after_s(self, origin: RunOrigin, account: _Account, calls_before: int) -> float:
        """About when enough will be done: what is too much, and at least a call's worth of it."""
        call_tokens = account.tokens // account.calls
        too_many = account.tokens - self._limits.tokens + 1
        tokens = max(too_many, call_tokens) + calls_before * call_tokens
        run = origin.training_run_id if self._per_run else None
        wait_s = self._predict(origin.tenant, run, tokens)
        return min(max(wait_s, SHORTEST_RETRY_S), LONGEST_RETRY_S)

    def _key(self, origin: RunOrigin) -> str:
        return origin.training_run_id if self._per_run else origin.tenant

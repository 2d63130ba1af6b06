"""Bounds on the continuations that are accepted and not finished, and when to come again."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mint_core.backlog import Backlog, Load, retry_after_s
from mint_core.errors import ResourceExhausted

SHARES = 4  # of one tenant fill the room
ALL = ""  # the account of all tenants; no tenant has an empty name
RATE_WINDOW_S = 30.0
UNKNOWN_WAIT_S = 1.0  # told while nothing has finished


class QueueFull(ResourceExhausted):
    """As many continuations of the tenant, or of all, are accepted as may be."""

    reason = "QUEUE_FULL"

    def __init__(self, held: Load, limit: Load, whose: str, wait_s: float) -> None:
        super().__init__(
            f"{held.count} continuations {whose} with {held.tokens} prompt tokens are accepted and "
            f"not finished, and more are taken below {limit.count} continuations and "
            f"{limit.tokens} tokens; this one has used up nothing: send it again in {wait_s:.1f} s",
            retry_after_s=wait_s,
            samples=held.count,
            tokens=held.tokens,
            max_samples=limit.count,
            max_tokens=limit.tokens,
        )


@dataclass(slots=True)
class Flow:
    """How fast continuations of one account finish, and until when its free places are promised."""

    since_s: float
    last_s: float = 0.0  # when some last finished
    finished: float = 0.0  # of late: each counts less with time
    promised_until_s: float = 0.0

    def note(self, finished: int, now_s: float) -> None:
        self.finished = self._faded(now_s) + finished
        self.last_s = now_s

    def wait_s(self, missing: int, wanted: int, now_s: float) -> float:
        """When a caller who wants so many places should come again: once the missing ones are
        there, and after those who were sent away before.
        """
        window_s = RATE_WINDOW_S * -math.expm1(-(now_s - self.since_s) / RATE_WINDOW_S)
        finished = self._faded(now_s)
        if not (finished and window_s):
            return UNKNOWN_WAIT_S
        seconds_each = window_s / finished
        due_s = max(now_s + missing * seconds_each, self.promised_until_s + wanted * seconds_each)
        wait_s = retry_after_s(due_s - now_s)
        self.promised_until_s = now_s + wait_s
        return wait_s

    def _faded(self, now_s: float) -> float:
        return self.finished * math.exp((self.last_s - now_s) / RATE_WINDOW_S)


class WaitingRoom:
    """Each tenant has its share, and all together have SHARES of them."""

    def __init__(self, share: Load, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants = Backlog(share)
        self._all = Backlog(Load(count=SHARES * share.count, tokens=SHARES * share.tokens))
        self._flows: dict[str, Flow] = {}  # of the accounts that hold something

    @property
    def samples(self) -> int:
        """Continuations that are accepted and not finished."""
        return self._all.held(ALL).count

    @contextmanager
    def place(self, tenant: str, load: Load) -> Iterator[None]:
        """Holds places for a request while it goes on. Raises QueueFull if there are none."""
        accounts = ((self._tenants, tenant, "of yours"), (self._all, ALL, "of all callers"))
        for backlog, name, whose in accounts:
            if backlog.is_full(name):
                raise self._refusal(backlog, name, whose, load)
        for backlog, name, _ in accounts:
            backlog.enter(name, load)
            self._flows.setdefault(name, Flow(self._clock()))
        try:
            yield
        finally:
            for backlog, name, _ in accounts:
                backlog.leave(name, load)
                self._flows[name].note(load.count, self._clock())
                if not backlog.held(name).count:
                    del self._flows[name]

    def _refusal(self, backlog: Backlog, name: str, whose: str, load: Load) -> QueueFull:
        held, limit = backlog.held(name), backlog.limit
        too_many = held.count - limit.count + 1
        too_long = math.ceil((held.tokens - limit.tokens + 1) * held.count / max(held.tokens, 1))
        missing = max(too_many, too_long)
        wait_s = self._flows[name].wait_s(missing, load.count, self._clock())
        return QueueFull(held, limit, whose, wait_s)

"""Bounds on the work that is accepted and not finished, counted by account."""

from dataclasses import dataclass

SHORTEST_RETRY_S = 0.1
LONGEST_RETRY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """So much work."""

    count: int  # of calls, or of continuations
    tokens: int  # of data


class Backlog:
    """Accounts with the same limit each. Work is taken while an account holds less than that: one
    piece may go over, so that none is too large.
    """

    def __init__(self, limit: Load) -> None:
        self.limit = limit
        self._held: dict[str, Load] = {}  # by the accounts with work

    def enter(self, name: str, load: Load) -> None:
        """Notes accepted work."""
        held = self.held(name)
        self._held[name] = Load(count=held.count + load.count, tokens=held.tokens + load.tokens)

    def leave(self, name: str, load: Load) -> None:
        """Notes that the work is finished."""
        held = self._held.pop(name)
        if left := held.count - load.count:
            self._held[name] = Load(count=left, tokens=held.tokens - load.tokens)

    def held(self, name: str) -> Load:
        """What the account holds."""
        return self._held.get(name, Load(count=0, tokens=0))

    def is_full(self, name: str) -> bool:
        held = self.held(name)
        return held.count >= self.limit.count or held.tokens >= self.limit.tokens


def retry_after_s(predicted_s: float) -> float:
    """When to tell a caller to come again who would fit in so many seconds: neither a storm nor an
    age."""
    return min(max(predicted_s, SHORTEST_RETRY_S), LONGEST_RETRY_S)

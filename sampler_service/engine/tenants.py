"""Who has had how much: tokens are shared equally between the tenants that want some.

Each tenant has a counter of the tokens computed for it (virtual token counters: Sheng et al. 2024,
"Fairness in serving large language models"), and the one with the least comes first. A tenant that
begins to wait starts from where those are that wait already: who wanted nothing has saved nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from sampler_service.engine.sequences import TokenSequence

TURN_TOKENS = 256  # after which a tenant leaves its only place to one that has none

Line = list[TokenSequence]  # oldest first
age = attrgetter("age")


def move(sequence: TokenSequence, line: Line | None) -> None:
    """Takes a sequence out of the line that it is in, and puts it into another."""
    if sequence.line is not None:
        del sequence.line[bisect_left(sequence.line, sequence.age, key=age)]
    if line is not None:
        insort(line, sequence, key=age)
    sequence.line = line


@dataclass(slots=True, eq=False)
class Tenant:
    """The sequences of one. Those in no line here wait for what another of them computes."""

    name: str
    served_tokens: int
    running: Line = field(default_factory=list)  # have a place
    ready: Line = field(default_factory=list)  # want a place, and have the blocks for it
    fresh: Line = field(default_factory=list)  # want a place, and hold nothing
    num_requests: int = 0

    @property
    def waits(self) -> bool:
        """Whether it wants more than the next token of each that runs."""
        return bool(self.ready or self.fresh) or not all(s.decodes for s in self.running)

    def next(self, with_fresh: bool) -> TokenSequence | None:
        """Whose turn it is to get a place, of those that want one."""
        lines = (self.ready, self.fresh) if with_fresh else (self.ready,)
        return min((line[0] for line in lines if line), key=age, default=None)

    def youngest(self) -> TokenSequence | None:
        """The first to give its blocks back."""
        lines = (self.ready, self.running)
        return max((line[-1] for line in lines if line), key=age, default=None)


class Tenants:
    """Those that have sequences."""

    def __init__(self) -> None:
        self._by_name: dict[str, Tenant] = {}
        self._reached_tokens = 0  # the least counter of those that waited

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._by_name.values())

    def of(self, sequence: TokenSequence) -> Tenant:
        return self._by_name[sequence.tenant]

    def want(self, name: str, had_tokens: int = 0) -> None:
        """Notes that a tenant has a new request, and what it has had of all engines."""
        tenant = self._by_name.setdefault(name, Tenant(name, self._reached_tokens))
        tenant.num_requests += 1
        tenant.served_tokens = max(tenant.served_tokens, had_tokens)
        if not tenant.waits:
            tenant.served_tokens = max(tenant.served_tokens, self._reached_tokens)

    def leave(self, name: str) -> None:
        """Notes that a request of a tenant has ended."""
        self._by_name[name].num_requests -= 1
        if not self._by_name[name].num_requests:
            del self._by_name[name]

    def note_reached(self) -> None:
        """Takes note of how far those who wait have come; if none does, all have what they want."""
        waiting = [t.served_tokens for t in self if t.waits]
        reached = min(waiting) if waiting else max((t.served_tokens for t in self), default=0)
        self._reached_tokens = max(self._reached_tokens, reached)

    def next(self, with_fresh: bool) -> TokenSequence | None:
        """Whose turn it is to get a place. Each that runs is about to get a token."""
        turns = (
            (tenant.served_tokens + len(tenant.running), sequence.age, sequence)
            for tenant in self
            if (sequence := tenant.next(with_fresh)) is not None
        )
        return min(turns, default=(0, 0, None))[2]

    def first_to_yield(self, sequence: TokenSequence) -> TokenSequence | None:
        """Who gives a place to this one: the youngest of the tenant with the most places, if that
        has still no fewer than the other then; and where there are more tenants than places, that
        of the tenant that has had the most.
        """
        mine = self.of(sequence)
        most = max(self, key=lambda tenant: len(tenant.running))
        if len(most.running) - 1 > len(mine.running):
            return most.running[-1]
        if not mine.running:
            most = max((t for t in self if t.running), key=attrgetter("served_tokens"))
            if most.served_tokens - mine.served_tokens >= TURN_TOKENS:
                return most.running[-1]
        return None

    def precedence(self, sequence: TokenSequence) -> tuple[int, tuple[int, int]]:
        """In which order blocks are given out, least first, and taken back, largest first."""
        return self.of(sequence).served_tokens, sequence.age

    def last_holder(self) -> TokenSequence:
        """Who is the first to give its blocks back."""
        holders = [s for tenant in self if (s := tenant.youngest()) is not None]
        return max(holders, key=self.precedence)

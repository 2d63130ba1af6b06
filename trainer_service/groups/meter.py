"""What a group has computed: for tenants' counters and shares, and for who looks at the group."""

from collections import Counter
from collections.abc import Sequence

from trainer_service.groups.shares import Shares
from trainer_service.jobs import StepResult, StepRow, Tile, TileResult
from trainer_service.queue.usage import Usage

HALF_LIFE_S = 10.0  # of what is told per second


class Meter:
    """Stands before the counters that all groups share."""

    def __init__(self, group: str, usage: Usage, shares: Shares) -> None:
        self._group = group
        self._usage = usage
        self._shares = shares
        self.tokens = 0  # as tiles cost them; replays included
        self.busy_s = 0.0  # of the engine
        self._then = (0, 0.0)  # the two when they were last looked at
        self.tokens_per_s = self.busy_share = 0.0  # of late

    def add(
        self,
        work: Sequence[Tile | StepRow],
        results: Sequence[TileResult | StepResult],
        tenants: Sequence[str | None],
        elapsed_s: float,
    ) -> Counter[str | None]:
        """See Usage."""
        parts = self._usage.add(work, results, tenants, elapsed_s)
        self.busy_s += elapsed_s
        self.tokens += parts.total()
        self._shares.charge(self._group, {tenant: n for tenant, n in parts.items() if tenant})
        return parts

    def look(self, interval_s: float) -> None:
        """Has what is told per second be that of now."""
        tokens, busy_s = self._then
        self._then = self.tokens, self.busy_s
        kept = 0.5 ** (interval_s / HALF_LIFE_S)
        rate, share = (self.tokens - tokens) / interval_s, (self.busy_s - busy_s) / interval_s
        self.tokens_per_s = kept * self.tokens_per_s + (1 - kept) * rate
        self.busy_share = kept * self.busy_share + (1 - kept) * min(1.0, share)

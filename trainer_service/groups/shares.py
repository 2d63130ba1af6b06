"""A tenant's share is one over all groups: who gets much elsewhere gets less here, while others
want it.

Each group's planner shares by weights. They are filled up here like water: those who have had the
least elsewhere of late first, until all have had alike. A part is left to each, so that no run
waits for ever because its tenant has others.
"""

from collections import Counter
from collections.abc import Callable, Mapping

HALF_LIFE_S = 10.0  # of what tenants have had
LEAST_PART = 1 / 8  # of the weight that a tenant would have without other groups


class Shares:
    def __init__(self, weight_of: Callable[[str], float]) -> None:
        """`weight_of` a tenant: how many times the tokens of one of weight 1 it gets."""
        self._weight_of = weight_of
        self._recent: dict[str, Counter[str]] = {}  # by group: tokens of late, by tenant
        self._parts: dict[str, Mapping[str, float]] = {}  # by group and tenant; absent: 1

    def weight_of(self, group: str, tenant: str) -> float:
        """A tenant's weight in a group."""
        parts = self._parts.get(group)
        return self._weight_of(tenant) * (parts.get(tenant, 1.0) if parts else 1.0)

    def charge(self, group: str, tokens: Mapping[str, int]) -> None:
        """Notes what tenants have had in a group."""
        self._recent.setdefault(group, Counter()).update(tokens)

    def forget(self, group: str) -> None:
        self._recent.pop(group, None)
        self._parts.pop(group, None)

    def look(self, interval_s: float) -> None:
        """Finds the weights anew. Called every second or so."""
        if len(self._recent) < 2:
            self._parts.clear()
        kept = 0.5 ** (interval_s / HALF_LIFE_S)
        totals: Counter[str] = Counter()
        for group, recent in self._recent.items():
            left = {tenant: had * kept for tenant, had in recent.items() if had * kept >= 1}
            self._recent[group] = Counter(left)
            totals.update(left)
        if len(self._recent) < 2:
            return
        for group, recent in self._recent.items():
            weights = {tenant: self._weight_of(tenant) for tenant in recent}
            elsewhere = {tenant: (totals[tenant] - had) for tenant, had in recent.items()}
            self._parts[group] = parts(weights, elsewhere, sum(recent.values()))


def parts(
    weights: Mapping[str, float], elsewhere: Mapping[str, float], tokens: float
) -> Mapping[str, float]:
    """By what each tenant's weight is to be multiplied, so that of so many tokens here and of what
    they have elsewhere all together get alike by their weights; 1 for who has the least elsewhere.
    """
    if not any(elsewhere.values()):
        return {}
    level = _level(weights, elsewhere, tokens)
    wanted = {tenant: max(0.0, level - elsewhere[tenant] / weights[tenant]) for tenant in weights}
    most = max(wanted.values())
    return {
        tenant: max(LEAST_PART, part / most) if most else 1.0 for tenant, part in wanted.items()
    }


def _level(weights: Mapping[str, float], elsewhere: Mapping[str, float], tokens: float) -> float:
    """Up to where the tokens fill, per weight."""
    steps = sorted((elsewhere[tenant] / weights[tenant], weights[tenant]) for tenant in weights)
    width = level = 0.0
    for bottom, weight in steps:
        if tokens <= (bottom - level) * width:
            break
        tokens -= (bottom - level) * width
        level, width = bottom, width + weight
    return level + tokens / width

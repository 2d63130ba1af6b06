"""Tenants share all replicas, not each by itself."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampler_service.replicas.shares import Shares
from tests.unit.sampler_service.test_fair_scheduling import Clock

PROMPT, MAX_TOKENS = 64, 32
PASSES = 1500


class Engines:
    """Schedulers, each a pass at a time, with what ends told to all as a front does."""

    def __init__(self, count: int) -> None:
        self.clocks = [Clock(max_running=4) for _ in range(count)]
        self.shares = Shares()
        self._open: list[dict[int, str]] = [{} for _ in range(count)]

    def ask(self, tenant: str, engine: int) -> None:
        had = self.shares.begin(tenant)
        request = self.clocks[engine].ask(tenant, PROMPT, MAX_TOKENS, had_tokens=had)
        self._open[engine][request] = tenant

    def under_way(self, tenant: str, engine: int) -> int:
        return list(self._open[engine].values()).count(tenant)

    def tick(self) -> None:
        for clock, under_way in zip(self.clocks, self._open, strict=True):
            clock.tick()
            for request in [each for each in under_way if (each, 0) not in clock.samples]:
                self.shares.end(under_way.pop(request), PROMPT + MAX_TOKENS)

    def served(self) -> Counter[str]:
        return sum((clock.served for clock in self.clocks), Counter())


def test_a_flood_of_all_replicas_leaves_one_to_who_wants_that_one() -> None:
    engines = Engines(2)
    for _ in range(PASSES):
        for tenant, engine in (("flood", 0), ("flood", 1), ("one", 1)):
            while engines.under_way(tenant, engine) < 8:
                engines.ask(tenant, engine)
        engines.tick()
    served = engines.served()
    assert served["one"] == pytest.approx(served["flood"], rel=0.2)  # a third, if not told


def test_who_wanted_nothing_for_long_owes_and_is_owed_nothing() -> None:
    engines = Engines(2)
    for number in range(PASSES):
        late = (("late", 1),) if number > PASSES // 2 else ()
        for tenant, engine in (("first", 0), ("first", 1), *late):
            while engines.under_way(tenant, engine) < 8:
                engines.ask(tenant, engine)
        engines.tick()
        if number == PASSES // 2:
            before = engines.served()
    gained = engines.served() - before
    assert gained["late"] == pytest.approx(gained["first"], rel=0.25)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 500)), max_size=60))
def test_nobody_begins_behind_those_who_have_had_the_least(events: list[tuple[str, int]]) -> None:
    shares, had = Shares(), Counter[str]()
    open_: list[tuple[str, int]] = []
    for tenant, tokens in events:
        active = {name for name, _ in open_}
        least = min((had[name] for name in active), default=0)
        told = shares.begin(tenant)
        assert told >= (had[tenant] if tenant in active else least)
        had[tenant] = told
        open_.append((tenant, tokens))
        if len(open_) > 3:
            ended, computed = open_.pop(0)
            shares.end(ended, computed)
            had[ended] += computed

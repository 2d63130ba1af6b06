"""Tokens and places are shared between tenants, whoever asks for more."""

from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler_service.engine.cache.blocks import BLOCK_TOKENS
from sampler_service.engine.tenants import TURN_TOKENS
from sampler_service.jobs import CHUNK_TOKENS
from tests.unit.sampler_service.scheduler_traffic import Traffic

ROOMY = 4000  # blocks


class Clock(Traffic):
    """Traffic that notes when each request drew its first token, in tokens computed before."""

    def __init__(self, blocks: int = ROOMY, max_running: int = 16) -> None:
        super().__init__(blocks, max_running, max_running + CHUNK_TOKENS, checked=False)
        self.now = 0
        self.tenants: dict[int, str] = {}
        self.came: dict[int, int] = {}
        self.first_token: dict[int, int] = {}  # after so many tokens
        self.served: Counter[str] = Counter()  # tokens computed
        self.gained: Counter[str] = Counter()  # less those computed again
        self._reached: dict[tuple[int, int], int] = {}  # tokens of each sequence
        self._ids = count(10)

    def ask(
        self,
        tenant: str,
        prompt: int,
        max_tokens: int,
        num_samples: int = 1,
        *,
        had_tokens: int = 0,
    ) -> int:
        tokens = [next(self._ids), *[0] * (prompt - 1)]  # that nobody else begins with
        request_id = self.add(tokens, num_samples, max_tokens, tenant=tenant, had_tokens=had_tokens)
        self.tenants[request_id], self.came[request_id] = tenant, self.now
        return request_id

    def tick(self) -> bool:
        step = self.step()
        for span in step.spans if step else ():
            tokens = span.stop - span.start
            self.now += tokens
            self.served[span.sequence.tenant] += tokens
            reached = max(span.start, self._reached.get(span.sequence.age, 0))
            self.gained[span.sequence.tenant] += max(0, span.stop - reached)
            self._reached[span.sequence.age] = max(span.stop, reached)
        for span in step.spans if step else ():
            if span.decodes:
                self.first_token.setdefault(span.sequence.request_id, self.now)
        return step is not None

    def uncomputed_prompts(self, tenant: str) -> int:
        requests = [i for i in self.tenants if i not in self.first_token]
        return sum(self.tenants[i] == tenant and not self.computed[i] for i in requests)

    def p95(self, tenant: str) -> float:
        """Of the tokens that were computed while a request waited for its first one."""
        waits = [self.first_token[i] - self.came[i] for i, t in self.tenants.items() if t == tenant]
        return float(np.percentile(waits, 95))


@pytest.mark.parametrize(("prompt", "max_tokens"), [(30, 40), (600, 4), (10, 200)])
def test_two_tenants_wait_as_long_whoever_came_first(prompt: int, max_tokens: int) -> None:
    clock = Clock()
    for tenant in ("a", "b"):
        for _ in range(32):
            clock.ask(tenant, prompt, max_tokens)
    while clock.tick():
        pass
    waits = sorted([clock.p95("a"), clock.p95("b")])
    assert waits[1] <= 1.5 * waits[0]


@pytest.mark.parametrize(("prompt", "max_tokens"), [(30, 40), (600, 4), (10, 200)])
def test_a_flood_costs_others_no_more_than_an_equal_share(prompt: int, max_tokens: int) -> None:
    def p95(flood: int) -> float:
        clock = Clock()
        for _ in range(flood):
            clock.ask("flood", prompt, max_tokens)
        for _ in range(3):
            clock.tick()
        for _ in range(16):
            clock.ask("calm", prompt, max_tokens)
        while clock.tick():
            pass
        return clock.p95("calm")

    assert p95(flood=400) <= 1.5 * p95(flood=16)


def test_one_more_request_starts_at_once_beside_a_flood() -> None:
    clock = Clock()
    for _ in range(100):
        clock.ask("flood", 30, 500)
    for _ in range(20):
        clock.tick()
    late = clock.ask("calm", 30, 5)
    for _ in range(3):
        clock.tick()
    assert late in clock.first_token


# What tenants ask for that compete for the same: for passes, or for places. (Beside one that waits
# for a place only, another may have the rest of each pass.)
prompts = st.tuples(st.integers(150, 700), st.just(1))
chatter = st.tuples(st.integers(1, 16), st.integers(20, 60))


def test_more_tenants_than_places_take_turns() -> None:
    clock = Clock(max_running=2)
    tenants = [f"t{i}" for i in range(7)]
    for tenant in tenants:
        clock.ask(tenant, 10, 2000)
    while clock.tick():
        served = [clock.served[tenant] for tenant in tenants]
        assert max(served) - min(served) <= 2 * TURN_TOKENS


@settings(max_examples=20)
@given(st.tuples(prompts, prompts) | st.tuples(chatter, chatter))
def test_tenants_that_always_wait_get_as_much(
    wishes: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    clock = Clock()
    for _ in range(100):
        for tenant, wish in zip("ab", wishes, strict=True):
            while clock.uncomputed_prompts(tenant) < 10:
                clock.ask(tenant, *wish)
        clock.tick()
        assert abs(clock.served["a"] - clock.served["b"]) <= 2 * CHUNK_TOKENS


def test_who_wanted_nothing_has_saved_nothing() -> None:
    clock = Clock()
    clock.ask("b", 5, 10_000)  # one that runs is not waited for
    for _ in range(200):
        clock.ask("a", 30, 40)
        clock.tick()
    before = dict(clock.served)
    assert before["a"] > 5 * before["b"]
    for _ in range(60):
        clock.ask("a", 30, 40)
        clock.ask("b", 30, 40)
        clock.tick()
    gained = {tenant: clock.served[tenant] - before[tenant] for tenant in "ab"}
    assert gained["b"] <= 1.5 * gained["a"]


def test_a_newcomer_gets_no_more_than_those_who_were_there() -> None:
    clock = Clock()
    for _ in range(200):
        clock.ask("a", 30, 40)
        clock.tick()
    before = clock.served["a"]
    for _ in range(60):
        clock.ask("a", 30, 40)
        clock.ask("b", 30, 40)
        clock.tick()
    assert clock.served["b"] <= 1.5 * (clock.served["a"] - before)


def test_what_is_computed_again_is_not_charged() -> None:
    """Else those whose long sequences give way would be behind for it, and give way again."""
    clock = Clock(blocks=60, max_running=8)
    for _ in range(400):
        for tenant, max_tokens in (("long", 200), ("short", 5)):
            while clock.uncomputed_prompts(tenant) < 5:
                clock.ask(tenant, 100, max_tokens)
        clock.tick()
    assert clock.served["long"] > 1.2 * clock.gained["long"], "none has given way"
    assert clock.gained["short"] <= 1.2 * clock.gained["long"]


@settings(max_examples=10)
@given(st.data())
def test_the_oldest_of_each_tenant_ends_while_others_flood(data: st.DataObject) -> None:
    clock = Clock(blocks=40, max_running=4)
    longest = 20 * BLOCK_TOKENS
    oldest = {t: clock.ask(t, data.draw(st.integers(1, longest)), longest) for t in "abc"}
    for _ in range(6000):
        if not any((request_id, 0) in clock.samples for request_id in oldest.values()):
            return
        tenant = data.draw(st.sampled_from("abc"))
        if len(clock.samples) < 30:
            clock.ask(tenant, data.draw(st.integers(1, longest)), data.draw(st.integers(1, 40)))
        clock.tick()
    raise AssertionError("an old request does not end")

"""Which replica a request goes to, and what is known of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sampler_service.adapters.coming import Coming
from sampler_service.replicas.choice import Standing, Wanted, choose, cost
from sampler_service.replicas.prompts import KeptPrompts, beginnings

TENANTS = ("a", "b", "c")
under_way = st.dictionaries(st.sampled_from(TENANTS), st.integers(1, 10_000))
standings = st.builds(
    Standing,
    under_way=under_way,
    warm_tokens=st.integers(0, 500),
    adapter=st.sampled_from(Coming),
    kept_tokens=st.integers(0, 1000),
)
wishes = st.builds(
    Wanted,
    tenant=st.sampled_from(TENANTS),
    prompt_tokens=st.integers(500, 1000),
    continuation_tokens=st.integers(0, 2000),
)


@given(wishes, st.lists(standings, min_size=1, max_size=5))
def test_the_cheapest_is_chosen_and_of_equals_the_first(
    wanted: Wanted, all_: list[Standing]
) -> None:
    chosen = choose(wanted, all_)
    keys = [(cost(wanted, each), each.kept_tokens, index) for index, each in enumerate(all_)]
    assert min(keys)[2] == chosen


@given(wishes, under_way, st.integers(16, 500), st.sampled_from(Coming))
def test_among_equally_busy_ones_it_goes_where_its_prompt_and_adapter_are(
    wanted: Wanted, busy: dict[str, int], warm_tokens: int, adapter: Coming
) -> None:
    cold = Standing(busy, adapter=adapter)
    assert choose(wanted, [cold, Standing(busy, warm_tokens, adapter)]) == 1
    assert choose(wanted, [Standing(busy, adapter=Coming(adapter)), cold]) == 0
    if adapter is not Coming.THERE:
        assert choose(wanted, [cold, Standing(busy)]) == 1


@given(wishes, st.integers(0, 500), st.sampled_from(Coming), st.integers(0, 10_000))
def test_the_warm_one_gives_way_when_its_queue_is_longer_than_what_loading_costs(
    wanted: Wanted, warm_tokens: int, adapter: Coming, queue: int
) -> None:
    warm = Standing({wanted.tenant: queue}, warm_tokens)
    chosen = choose(wanted, [warm, Standing({}, adapter=adapter)])
    assert chosen == int(queue > warm_tokens + adapter)


@given(wishes, st.integers(0, 10_000), st.integers(0, 10**9))
def test_a_flood_of_others_counts_as_far_as_the_tenants_own_work_goes(
    wanted: Wanted, own: int, flood: int
) -> None:
    least = wanted.prompt_tokens + wanted.continuation_tokens + own
    assert cost(wanted, Standing({wanted.tenant: own, "x": flood})) <= 2 * least


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(2, 4))
def test_requests_alike_are_spread_evenly(lengths: list[int], count: int) -> None:
    queues: list[dict[str, int]] = [{"a": 0} for _ in range(count)]
    for length in lengths:
        chosen = choose(Wanted("a", length, 0), [Standing(queue) for queue in queues])
        queues[chosen]["a"] += length
    totals = [queue["a"] for queue in queues]
    assert max(totals) - min(totals) <= max(lengths)


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=300)


def keys(prompt: list[int], tenant: str = "a", adapter: str = "x") -> "list[tuple[int, bytes]]":
    return list(beginnings(tenant, adapter, np.array(prompt, np.int64)))


@given(tokens, tokens, tokens)
def test_what_prompts_have_in_common_is_told_within_a_fifth(
    common: list[int], one: list[int], other: list[int]
) -> None:
    kept = KeptPrompts()
    kept.add(keys([*common, 4, *one]), 10_000)
    found = kept.common(keys([*common, 5, *other]))
    assert found <= len(common)
    assert found > 0.8 * len(common) - 1 or len(common) < 16


@given(tokens)
def test_no_other_tenant_or_adapter_has_the_same_beginnings(prompt: list[int]) -> None:
    kept = KeptPrompts()
    kept.add(keys(prompt), 10_000)
    assert not kept.common(keys(prompt, tenant="b"))
    assert not kept.common(keys(prompt, adapter="y"))
    assert kept.common(keys(prompt)) or len(prompt) < 16


@given(st.lists(tokens, min_size=1, max_size=20), st.integers(0, 2000))
def test_no_more_is_kept_than_the_cache_holds_and_the_last_first(
    prompts: list[list[int]], most_tokens: int
) -> None:
    kept = KeptPrompts()
    for prompt in prompts:
        kept.add(keys(prompt), most_tokens)
        assert kept.tokens <= most_tokens
        longest = max((length for length, _ in keys(prompt)), default=0)
        assert kept.common(keys(prompt)) == max(
            (length for length, _ in keys(prompt) if length <= most_tokens), default=0
        )
        assert kept.common(keys(prompt)) == longest or most_tokens < longest

"""A tenant's share over all groups."""

import pytest

from trainer_service.groups.shares import LEAST_PART, Shares, parts


def alike(tenant: str) -> float:
    return 1.0


def test_who_has_nothing_elsewhere_shares_as_in_one_group() -> None:
    assert parts({"a": 1.0, "b": 2.0}, {"a": 0, "b": 0}, 100) == {}


def test_who_has_much_elsewhere_has_a_small_part_left() -> None:
    assert parts({"a": 1.0, "b": 1.0}, {"a": 100, "b": 0}, 100) == {"a": LEAST_PART, "b": 1.0}


def test_what_is_missing_is_filled_up() -> None:
    """100 tokens over a (40 elsewhere) and b: 30 and 70 make them alike."""
    found = parts({"a": 1.0, "b": 1.0}, {"a": 40, "b": 0}, 100)
    assert found["a"] / found["b"] == pytest.approx(30 / 70)


def test_weights_count_over_all_groups() -> None:
    """b weighs two: of 120 here and 30 elsewhere a is to have 50 in all and b 100."""
    found = parts({"a": 1.0, "b": 2.0}, {"a": 30, "b": 0}, 120)
    assert found["a"] / found["b"] == pytest.approx((20 / 1) / (100 / 2))


def test_a_tenant_alone_has_all() -> None:
    assert parts({"a": 1.0}, {"a": 500}, 100)["a"] == 1.0


def test_tenants_that_want_all_they_can_get_come_to_alike_shares() -> None:
    """a has runs in both groups and b in one: each gets a group's worth, but for a's least part."""
    shares, had = Shares(alike), {"a": 0.0, "b": 0.0}
    for second in range(200):
        weights = {tenant: shares.weight_of("g0", tenant) for tenant in had}
        shared = {tenant: 1000 * part / sum(weights.values()) for tenant, part in weights.items()}
        shares.charge("g0", {tenant: round(tokens) for tenant, tokens in shared.items()})
        shares.charge("g1", {"a": 1000})
        if second >= 100:
            had["a"] += shared["a"] + 1000
            had["b"] += shared["b"]
        shares.look(1.0)

    assert had["b"] / had["a"] == pytest.approx(1.0, abs=0.25)  # 1 : 3 without


def test_what_was_long_ago_counts_no_more() -> None:
    shares = Shares(alike)
    shares.charge("g0", {"a": 1000, "b": 1000})
    shares.charge("g1", {"a": 1000})
    shares.look(1.0)
    assert shares.weight_of("g0", "a") < 1.0
    for _ in range(200):
        shares.look(1.0)
    assert shares.weight_of("g0", "a") == 1.0


def test_a_group_that_is_gone_counts_no_more() -> None:
    shares = Shares(alike)
    shares.charge("g0", {"a": 1000, "b": 1000})
    shares.charge("g1", {"a": 1000})
    shares.look(1.0)
    shares.forget("g1")
    shares.look(1.0)
    assert shares.weight_of("g0", "a") == 1.0

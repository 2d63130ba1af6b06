"""Budget, order and fairness of plans."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer_service.calls import call, compute, document, of, step, wide_document
from trainer_service.calls import Compute
from trainer_service.jobs import (
    TARGETS_PER_TOKEN,
    CrossEntropy,
    Plan,
    StepRows,
    Tile,
    most_targets,
    tile_cost,
    tile_tokens,
)
from trainer_service.queue.planner import MOST_COMING, Planner, cut, most_tile_tokens

BUDGET = 64


def tiles(
    run: str, sequence: int, *lengths: int, budget: int = BUDGET, isolated: bool = False
) -> tuple[Tile, ...]:
    return cut(
        compute(*lengths),
        most_tile_tokens(budget),
        training_run_id=run,
        sequence=sequence,
        isolated=isolated,
    )


def plans(planner: Planner) -> list[Plan]:
    made = []
    while isinstance(job := planner.next_job(), Plan):
        made.append(job)
    assert job is None
    return made


def test_a_call_is_cut_at_document_boundaries() -> None:
    cuts = tiles("a", 1, 9, 7, 5, 60, 1)

    assert [[len(d.tokens) for d in tile.documents] for tile in cuts] == [[9, 7], [5], [60], [1]]
    assert [tile.index for tile in cuts] == [0, 1, 2, 3]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 200))
def test_every_document_is_in_one_tile_and_in_order(lengths: list[int], budget: int) -> None:
    cuts = tiles("a", 1, *lengths, budget=budget)

    assert [len(d.tokens) for tile in cuts for d in tile.documents] == lengths
    assert all(len(t.documents) == 1 or tile_tokens(t) <= max(1, budget // 4) for t in cuts)


def test_a_tile_has_as_many_targets_at_each_position() -> None:
    narrow, wide = document(3), replace(document(3), targets=np.zeros((3, 2), np.int64))
    work = Compute(
        documents=(narrow, narrow, wide, wide, narrow),
        loss=CrossEntropy(),
        backward=True,
        weighted_only=False,
    )

    assert [len(tile.documents) for tile in cut(work, 400, training_run_id="a", sequence=1)] == [
        2,
        2,
        1,
    ]


def test_documents_of_different_runs_share_a_plan() -> None:
    planner = Planner(BUDGET)
    planner.add("x", tiles("a", 1, 8))
    planner.add("x", tiles("b", 1, 8))
    planner.add("y", tiles("c", 1, 8))

    (plan,) = plans(planner)

    assert {tile.training_run_id for tile in plan.tiles} == {"a", "b", "c"}


def test_while_others_are_about_to_call_again_nobody_fills_a_pass() -> None:
    planner = Planner(BUDGET)
    planner.add("large", tiles("a", 1, *[16] * 40))
    for tenant in "bcdefgh":
        planner.add(tenant, tiles(tenant, 1, 4))

    sizes = [sum(map(tile_tokens, plan.tiles)) for plan in plans(planner)]

    # All of them, then for four plans no more than a tile, and at last whole passes.
    assert sizes == [60, 16, 16, 16, 16, *[64] * 8, 32]
    assert sum(sizes) == 40 * 16 + 7 * 4


def test_ready_steps_go_together_and_first() -> None:
    planner = Planner(BUDGET)
    planner.add("x", tiles("a", 1, 8))
    planner.add_step(step("b"))
    planner.add_step(step("c"))

    assert planner.next_job() == StepRows((step("b"), step("c")), coming=("a",))
    assert isinstance(planner.next_job(), Plan)
    assert planner.next_job() is None


def test_those_that_come_next_are_named_in_turns_of_tenants_and_few_of_many() -> None:
    planner = Planner(BUDGET)
    for i in range(3):
        planner.add("x", tiles(f"x{i}", 1, BUDGET))
    planner.add("y", tiles("y0", 1, BUDGET))
    assert planner.coming() == ("x0", "y0", "x1", "x2")
    for i in range(3):
        job = planner.next_job()
        assert isinstance(job, Plan)
        assert job.coming == planner.coming()
        assert len(job.coming) == 3 - i
    for i in range(1000):
        planner.add(f"tenant{i}", tiles(f"run{i}", 1, 4))
    assert len(planner.coming()) == MOST_COMING


def test_a_document_above_the_budget_has_a_plan_of_its_own() -> None:
    planner = Planner(BUDGET)
    planner.add("x", tiles("a", 1, 100, 4))

    assert [tile_tokens(tile) for plan in plans(planner) for tile in plan.tiles] == [100, 4]


def test_an_isolated_run_shares_no_plan() -> None:
    planner = Planner(BUDGET)
    planner.add("x", tiles("a", 1, 8))
    planner.add("x", tiles("alone", 1, 8, 30, isolated=True))
    planner.add("y", tiles("b", 1, 8))
    planner.add("x", tiles("alone", 2, 8, isolated=True))
    planner.add("x", tiles("a", 2, 8))

    made = [[(tile.training_run_id, tile.sequence) for tile in p.tiles] for p in plans(planner)]

    assert all(len(plan) == 1 for plan in made if ("alone", 1) in plan or ("alone", 2) in plan)
    order = [place for plan in made for place in plan]
    assert [place for place in order if place[0] == "alone"] == [*[("alone", 1)] * 2, ("alone", 2)]
    assert {place for place in order if place[0] != "alone"} == {("a", 1), ("a", 2), ("b", 1)}


Calls = list[tuple[int, int, list[int]]]  # tenant, run of the tenant, lengths
CALLS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 2), st.lists(st.integers(1, 90), min_size=1, max_size=6)
    ),
    max_size=25,
)


@settings(max_examples=100)
@given(CALLS, st.integers(1, 128))
def test_plans_keep_the_budget_and_the_order_and_lose_nothing(calls: Calls, budget: int) -> None:
    planner = Planner(budget)
    added = defaultdict(list)
    for sequence, (tenant, run, lengths) in enumerate(calls, start=1):
        name = f"{tenant}-{run}"
        cuts = tiles(name, sequence, *lengths, budget=budget, isolated=run == 2)
        planner.add(str(tenant), cuts)
        added[name] += [(tile.sequence, tile.index) for tile in cuts]

    made = plans(planner)

    done = defaultdict(list)
    for plan in made:
        assert len(plan.tiles) == 1 or not any(tile.isolated for tile in plan.tiles)
        assert len(plan.tiles) == 1 or sum(map(tile_tokens, plan.tiles)) <= budget
        for tile in plan.tiles:
            done[tile.training_run_id].append((tile.sequence, tile.index))
    assert done == added


def test_targets_count_in_cuts_and_the_first_of_each_token_is_its_own() -> None:
    assert document(7).cost == wide_document(7, 1).cost == 7
    assert wide_document(2, 1 + TARGETS_PER_TOKEN).cost == 4
    assert wide_document(1, 2).cost == 2
    assert wide_document(1, most_targets(16)).cost == 16
    assert call(1, work=of(document(3), wide_document(2, 300))).cost == 3 + 5
    assert call(1, work=of(document(3), wide_document(2, 300))).tokens == 5
    wide = [wide_document(2, 1 + 3 * TARGETS_PER_TOKEN) for _ in range(4)]  # 8 tokens' worth each

    cuts = cut(of(*wide), 16, training_run_id="a", sequence=1)

    assert [len(tile.documents) for tile in cuts] == [2, 2]
    assert [tile_cost(tile) for tile in cuts] == [16, 16]
    assert [tile_tokens(tile) for tile in cuts] == [4, 4]


def test_shares_are_in_what_targets_cost() -> None:
    """A flood of single tokens with a million targets each."""
    planner = Planner(BUDGET)
    million = wide_document(1, 1_000_000)
    for sequence in range(1, 5):
        planner.add("wide", cut(of(million), 16, training_run_id="wide", sequence=sequence))
    for sequence in range(1, 1 + 3 * million.cost // 16):
        planner.add("narrow", tiles("narrow", sequence, 16))

    served = order(planner)

    before = served[: [i for i, run in enumerate(served) if run == "wide"][1]].count("narrow")
    assert before * 16 >= million.cost  # as much as the first of them, before there is a second
    assert planner.tokens_ahead("narrow", "narrow") is None


def order(planner: Planner) -> list[str]:
    return [tile.training_run_id for plan in plans(planner) for tile in plan.tiles]


def test_a_flood_of_one_run_does_not_delay_another_beyond_its_share() -> None:
    planner = Planner(BUDGET)
    for sequence in range(1, 51):
        planner.add("x", tiles("flood", sequence, 32))
    planner.add("x", tiles("small", 1, 32))

    assert order(planner).index("small") <= 2


def test_runs_do_not_multiply_a_tenants_share() -> None:
    planner = Planner(BUDGET)
    for run in range(8):
        for sequence in range(1, 11):
            planner.add("many", tiles(f"many-{run}", sequence, 32))
    for sequence in range(1, 11):
        planner.add("one", tiles("one", sequence, 32))

    first = Counter("one" if run == "one" else "many" for run in order(planner)[:20])

    assert first == {"one": 10, "many": 10}


@pytest.mark.parametrize("lengths", [(32,), (8, 8, 8, 8), (1,) * 32])
def test_shares_are_in_tokens_whatever_the_documents_length(lengths: Sequence[int]) -> None:
    planner = Planner(BUDGET)
    for sequence in range(1, 101):
        planner.add("x", tiles("long", sequence, 30))
        for length in lengths:
            planner.add("x", tiles("short", sequence, length))
    taken: Counter[str] = Counter()
    while taken.total() < 20 * BUDGET:
        plan = planner.next_job()
        assert isinstance(plan, Plan)
        for tile in plan.tiles:
            taken[tile.training_run_id] += tile_tokens(tile)

    assert abs(taken["long"] - taken["short"]) <= 2 * BUDGET


def test_an_idle_run_saves_no_share_up() -> None:
    planner = Planner(BUDGET)
    for sequence in range(1, 41):
        planner.add("x", tiles("busy", sequence, 32))
    for _ in range(10):
        planner.next_job()
    for sequence in range(1, 21):
        planner.add("x", tiles("late", sequence, 32))

    assert Counter(order(planner)[:10])["late"] in (4, 5, 6)


def test_what_a_run_has_queued_is_taken_back() -> None:
    planner = Planner(BUDGET)
    for run in ("a", "b"):
        planner.add("ann", tiles(run, 1, 8, 16, isolated=run == "a"))
        planner.add_step(step(run))
    planner.add("bob", tiles("c", 1, 8))

    taken = planner.withdraw("a")

    assert sorted(taken) == [("a", 0, 0), ("a", 1, 0), ("a", 1, 1)]
    assert planner.withdraw("a") == []
    steps = planner.next_job()
    assert isinstance(steps, StepRows)
    assert [each.training_run_id for each in steps.steps] == ["b"]
    left = [tile.training_run_id for plan in plans(planner) for tile in plan.tiles]
    assert sorted(left) == ["b", "b", "c"]

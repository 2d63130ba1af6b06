"""What holds of every sequence of plans, whatever arrives between them."""

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer_service.calls import compute
from trainer_service.jobs import Plan, Tile, tile_tokens
from trainer_service.queue.planner import Planner, cut, most_tile_tokens


@dataclass(frozen=True)
class Arrival:
    """One call."""

    tenant: str
    run: str
    lengths: tuple[int, ...]


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=6).map(tuple)
ARRIVALS = st.builds(
    lambda tenant, run, lengths: Arrival(tenant, tenant + run, lengths),
    st.sampled_from("abc"),
    st.sampled_from("123"),
    LENGTHS,
)
# Calls, and the moments at which the engine is idle.
HISTORIES = st.lists(ARRIVALS | st.none(), max_size=40)
BUDGETS = st.integers(1, 128)
WEIGHTS = st.fixed_dictionaries({tenant: st.sampled_from([0.25, 1.0, 3.0]) for tenant in "abc"})


class History:
    """A planner, what it was given, and what it has planned."""

    def __init__(self, budget: int, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.planner = Planner(budget, weights.__getitem__)
        self.budget = budget
        self.added: dict[str, list[Tile]] = defaultdict(list)
        self.served: dict[str, list[Tile]] = defaultdict(list)
        self.tenants: dict[str, str] = {}

    def add(self, arrival: Arrival) -> None:
        sequence = len(self.added[arrival.run]) + 1
        tiles = cut(
            compute(*arrival.lengths),
            most_tile_tokens(self.budget),
            training_run_id=arrival.run,
            sequence=sequence,
        )
        self.planner.add(arrival.tenant, tiles)
        self.added[arrival.run] += tiles
        self.tenants[arrival.run] = arrival.tenant

    def plan(self) -> Plan | None:
        job = self.planner.next_job()
        assert not job or isinstance(job, Plan)
        for tile in job.tiles if job else ():
            self.served[tile.training_run_id].append(tile)
        return job

    def drain(self) -> Iterator[Plan]:
        while plan := self.plan():
            yield plan

    def play(self, steps: list[Arrival | None], look: Callable[[Plan], None]) -> None:
        for step in steps:
            if step is not None:
                self.add(step)
            elif plan := self.plan():
                look(plan)
        for plan in self.drain():
            look(plan)


def tokens_of(plan: Plan) -> int:
    return sum(map(tile_tokens, plan.tiles))


@settings(max_examples=150)
@given(HISTORIES, BUDGETS, WEIGHTS)
def test_plans_keep_the_budget_and_every_document_is_in_one_in_order(
    steps: list[Arrival | None], budget: int, weights: dict[str, float]
) -> None:
    history = History(budget, weights)

    def look(plan: Plan) -> None:
        assert tokens_of(plan) <= budget or len(plan.tiles) == 1
        # A tile above half a budget is one long document: nothing can be cut from it.
        assert all(
            tile_tokens(tile) <= max(1, budget // 2) or len(tile.documents) == 1
            for tile in plan.tiles
        )

    history.play(steps, look)

    # The very tiles that the call's own data gave, whoever shared the plans.
    assert {run: list(map(id, tiles)) for run, tiles in history.served.items()} == {
        run: list(map(id, tiles)) for run, tiles in history.added.items()
    }


@settings(max_examples=150)
@given(HISTORIES, st.integers(8, 128), WEIGHTS)
def test_no_run_waits_longer_than_its_rivals_shares(
    steps: list[Arrival | None], budget: int, weights: dict[str, float]
) -> None:
    """Between two tiles of a run that has work, others take at most what their turns allow."""
    history = History(budget, weights)
    quantum = budget // 8
    gaps: Counter[str] = Counter()  # tokens of others since the run's last tile, or its arrival
    heads: dict[str, int] = {}
    largest = max((n for step in steps if step for n in step.lengths), default=0)
    largest = max(largest, budget // 2)

    def allowed(run: str) -> float:
        """By the theory of deficit round robin, in a tenant and then among tenants."""
        tenant, head = history.tenants[run], heads[run]
        turns = math.ceil(head / quantum) + 1
        siblings = sum(history.tenants[other] == tenant for other in history.tenants) - 1
        inside = siblings * (turns * quantum + largest)
        turns = math.ceil((inside + head) / (quantum * weights[tenant])) + 1
        others = [other for other in weights if other != tenant]
        return inside + sum(turns * quantum * weights[other] + largest for other in others)

    def look(plan: Plan) -> None:
        for tile in plan.tiles:
            run = tile.training_run_id
            assert gaps[run] <= allowed(run)
            for other in history.added:
                if other != run and len(history.added[other]) > len(done[other]):
                    gaps[other] += tile_tokens(tile)
            gaps[run] = 0
            done[run].append(tile)
            if len(done[run]) < len(history.added[run]):
                heads[run] = tile_tokens(history.added[run][len(done[run])])

    done: dict[str, list[Tile]] = defaultdict(list)
    for step in [*steps, *[None] * 500]:
        if step is not None:
            if len(history.added[step.run]) == len(done[step.run]):
                history.add(step)
                gaps[step.run] = 0
                heads[step.run] = tile_tokens(history.added[step.run][len(done[step.run])])
            else:
                history.add(step)
        elif plan := history.plan():
            look(plan)
    assert not history.plan()


@settings(max_examples=30)
@given(st.data(), st.integers(16, 128), WEIGHTS)
def test_tenants_with_work_share_as_their_weights_say(
    data: st.DataObject, budget: int, weights: dict[str, float]
) -> None:
    history = History(budget, weights)
    lengths = {tenant: data.draw(st.integers(1, budget // 2), tenant) for tenant in weights}
    taken: Counter[str] = Counter()
    while taken.total() < 100 * budget:
        for tenant, length in lengths.items():  # so that none of them is ever without work
            for run in "12"[: 1 + (length % 2)]:
                while _queued(history, tenant + run) < 2 * budget:
                    history.add(Arrival(tenant, tenant + run, (length,) * 4))
        plan = history.plan()
        assert plan
        for tile in plan.tiles:
            taken[history.tenants[tile.training_run_id]] += tile_tokens(tile)

    shares = {tenant: taken[tenant] / weights[tenant] for tenant in weights}
    most = 2 * (budget // 8 + budget / min(weights.values()))
    assert max(shares.values()) - min(shares.values()) <= most


def _queued(history: History, run: str) -> int:
    waiting = history.added[run][len(history.served[run]) :]
    return sum(map(tile_tokens, waiting))


# Bursts of short documents, each a call: then shares show, and no tile hides them.
BURSTS = st.lists(
    st.builds(
        lambda tenant, run, count: [Arrival(tenant, tenant + run, (1,))] * count,
        st.sampled_from("abc"),
        st.sampled_from("12"),
        st.integers(1, 60),
    )
    | st.just([None]),
    max_size=12,
).map(lambda bursts: [step for burst in bursts for step in burst])


@settings(max_examples=150)
@given(HISTORIES | BURSTS, BUDGETS, WEIGHTS)
def test_tokens_ahead_are_those_that_then_come_first(
    steps: list[Arrival | None], budget: int, weights: dict[str, float]
) -> None:
    """Against the slow way: a copy of the planner that is emptied."""
    history = History(budget, weights)
    for step in steps:
        if step is not None:
            history.add(step)
        else:
            history.plan()
    told = {
        run: history.planner.tokens_ahead(tenant, run) for run, tenant in history.tenants.items()
    }
    before = {run: len(tiles) for run, tiles in history.served.items()}
    largest = max((tile_tokens(t) for tiles in history.added.values() for t in tiles), default=0)
    rivals = len(history.tenants) + len(weights)

    found: dict[str, int] = {}
    total = 0
    for plan in copy.deepcopy(history).drain():
        for tile in plan.tiles:
            found.setdefault(tile.training_run_id, total)
            total += tile_tokens(tile)

    for run, ahead in told.items():
        if len(history.added[run]) == before.get(run, 0):
            assert ahead is None
        else:
            assert ahead is not None
            assert abs(ahead - found[run]) <= rivals * (
                largest + budget / 8 / min(weights.values())
            )


def test_tokens_ahead_of_tenants_that_have_just_come() -> None:
    """Turns of 16 tokens, three times as many for the first."""
    history = History(128, {"a": 3.0, "b": 1.0, "c": 1.0})
    for tenant in "abc":
        for _ in range(100):
            history.add(Arrival(tenant, tenant, (1,)))

    assert [history.planner.tokens_ahead(tenant, tenant) for tenant in "abc"] == [0, 48, 64]
    # 20 tokens of b's take two turns: a has had two by then, and c one.
    assert history.planner.tokens_until("b", None, 20) == 20 + min(100, 2 * 48) + 16


def test_small_tenants_pass_a_tenant_with_endless_calls() -> None:
    """Counted in plans: a heavy tenant's 50 micro-batches, without end, and 7 small steps."""
    budget, small_tokens = 1024, 256
    history = History(budget, dict.fromkeys(["heavy", *"1234567"], 1.0))
    flood = Arrival("heavy", "heavy", (512,) * 50)
    waits = []
    for _ in range(20):
        history.add(flood)  # more than is ever worked off
        history.plan()  # which the engine is busy with when the small ones come
        for small in "1234567":
            history.add(Arrival(small, small, (small_tokens,)))
        plans = 0
        while len(history.served["7"]) < len(history.added["7"]):
            plan = history.plan()
            assert plan
            plans += 1
            assert sum(tile.training_run_id == "heavy" for tile in plan.tiles) <= 1
        waits.append(plans)
        assert all(len(history.served[run]) == len(history.added[run]) for run in "1234567")

    assert max(waits) <= 3  # 7 x 256 tokens, and a tile of 512 that was due, fill 2.25 plans


def test_a_small_tenant_alone_beside_a_flood_is_in_the_next_plan() -> None:
    history = History(1024, {"heavy": 1.0, "small": 1.0})
    for _ in range(20):
        history.add(Arrival("heavy", "heavy", (512,) * 50))
        history.plan()
        history.add(Arrival("small", "small", (256,)))
        plan = history.plan()
        assert plan
        assert "small" in {tile.training_run_id for tile in plan.tiles}


def test_runs_of_one_tenant_pass_each_other_likewise() -> None:
    """Where there are no keys, all runs belong to one tenant."""
    history = History(1024, {"default": 1.0})
    for _ in range(20):
        history.add(Arrival("default", "heavy", (512,) * 50))
        history.plan()
        history.add(Arrival("default", "small", (256,)))
        plan = history.plan()
        assert plan
        assert "small" in {tile.training_run_id for tile in plan.tiles}

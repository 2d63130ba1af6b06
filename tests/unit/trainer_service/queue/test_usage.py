"""What is counted for each tenant."""

from typing import Any

import pytest

from mint_core.errors import EngineFault
from mint_core.rpc.metrics import Metrics
from tests.metrics import scrape, value
from tests.unit.trainer_service.calls import compute, of, wide_document
from trainer_service.jobs import (
    TARGETS_PER_TOKEN,
    AdamParams,
    StepResult,
    StepRow,
    Tile,
    TileResult,
)
from trainer_service.queue.planner import cut
from trainer_service.queue.usage import Usage

TILE_ERROR = TileResult(error=EngineFault("too large"))
STEP_ERROR = StepResult(step=0, grad_norm=0.0, error=EngineFault("no"))
TAKEN = StepResult(step=1, grad_norm=0.0)
STEPS = tuple(StepRow(run, AdamParams()) for run in "abcd")


def tile(run: str, tokens: int, *, backward: bool) -> Tile:
    (only,) = cut(compute(tokens, backward=backward), 10_000, training_run_id=run, sequence=1)
    return only


class Counters:
    """A usage and what Prometheus reads of it."""

    def __init__(self) -> None:
        metrics = Metrics()
        self.usage = Usage(metrics)
        self._address = f"127.0.0.1:{metrics.serve('127.0.0.1:0')}"

    def read(self, tenant: str) -> tuple[float, ...]:
        """Tokens forward, tokens backward, seconds of the engine, steps."""
        samples = scrape(self._address)

        def of(name: str, **labels: Any) -> float:
            return value(samples, f"mint_usage_{name}_total", tenant=tenant, **labels)

        forward, backward = (of("tokens", kind=kind) for kind in ("forward", "backward"))
        return forward, backward, of("engine_seconds"), of("optim_steps")


def test_a_pass_is_shared_by_tokens() -> None:
    counters = Counters()
    plan = (tile("a", 30, backward=True), tile("b", 50, backward=False))

    counters.usage.add(plan, (TileResult(),) * 2, ("ann", "bob"), 2.0)
    counters.usage.add(plan[:1], (TileResult(),), ("ann",), 0.25)

    assert counters.read("ann") == (60, 30 + 30, 0.75 + 0.25, 0)
    assert counters.read("bob") == (50, 0, 1.25, 0)


def test_who_asks_for_many_targets_pays_for_them_and_tokens_stay_tokens() -> None:
    counters = Counters()
    wide = wide_document(10, 1 + 8 * TARGETS_PER_TOKEN)  # 90 tokens' worth
    plan = (
        *cut(of(wide), 10_000, training_run_id="a", sequence=1),
        tile("b", 10, backward=True),
    )

    counters.usage.add(plan, (TileResult(),) * 2, ("ann", "bob"), 1.0)

    assert counters.read("ann") == (10, 10, 0.9, 0)
    assert counters.read("bob") == (10, 10, 0.1, 0)


def test_runs_of_a_tenant_add_up() -> None:
    counters = Counters()
    plan = (tile("a", 30, backward=True), tile("b", 50, backward=True))

    counters.usage.add(plan, (TileResult(),) * 2, ("ann", "ann"), 3.0)

    assert counters.read("ann") == (80, 80, pytest.approx(3.0), 0)


def test_what_failed_took_time_but_no_tokens_or_steps_are_counted() -> None:
    counters = Counters()
    plan = (tile("a", 10, backward=True), tile("b", 30, backward=True))

    counters.usage.add(plan, (TILE_ERROR, TileResult()), ("ann", "bob"), 4.0)
    counters.usage.add(STEPS[:2], (STEP_ERROR, TAKEN), ("ann", "bob"), 0.5)

    assert counters.read("ann") == (0, 0, 1.25, 0)
    assert counters.read("bob") == (30, 30, 3.25, 1)


def test_the_time_of_steps_is_shared_equally() -> None:
    counters = Counters()

    counters.usage.add(STEPS, (TAKEN,) * 4, ("ann", "bob", "ann", "ann"), 1.0)

    assert counters.read("ann") == (0, 0, 0.75, 3)
    assert counters.read("bob") == (0, 0, 0.25, 1)

"""What each tenant has had computed, for Prometheus."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from mint_core.rpc.metrics import Metrics
from trainer_service.jobs import StepResult, StepRow, Tile, TileResult, tile_cost, tile_tokens


class Accounts(Protocol):
    """Where what an engine has computed is noted."""

    def add(
        self,
        work: Sequence[Tile | StepRow],
        results: Sequence[TileResult | StepResult],
        tenants: Sequence[str | None],
        elapsed_s: float,
    ) -> object: ...


class Usage:
    """Counters by tenant. What the engine refused or lost is not counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._tokens = metrics.counter(
            "mint_usage_tokens",
            "Tokens computed: forward counts those of every call, backward those with a gradient",
            ["tenant", "kind"],
        )
        self._engine_seconds = metrics.counter(
            "mint_usage_engine_seconds",
            "Time of the engine; a pass is shared by what tiles cost, steps equally",
            ["tenant"],
        )
        self._optim_steps = metrics.counter(
            "mint_usage_optim_steps", "Optimizer steps taken", ["tenant"]
        )

    def add(
        self,
        work: Sequence[Tile | StepRow],
        results: Sequence[TileResult | StepResult],
        tenants: Sequence[str | None],
        elapsed_s: float,
    ) -> Counter[str | None]:
        """Counts a pass or steps, and returns what it cost by tenant, in tokens. `tenants` are
        those of the work, None of what is done again.
        """
        parts: Counter[str | None] = Counter()
        for each, result, tenant in zip(work, results, tenants, strict=True):
            parts[tenant] += tile_cost(each) if isinstance(each, Tile) else 1
            if tenant is None:
                continue
            if isinstance(each, StepRow):
                self._optim_steps.labels(tenant).inc(result.error is None)
            elif result.error is None:
                self._tokens.labels(tenant, "forward").inc(tile_tokens(each))
                self._tokens.labels(tenant, "backward").inc(tile_tokens(each) * each.backward)
        for tenant, part in parts.items():
            if tenant is not None:
                self._engine_seconds.labels(tenant).inc(elapsed_s * part / parts.total())
        return parts

"""What each tenant has had computed, for Prometheus."""

from collections import Counter
from collections.abc import Sequence

from mint_core.rpc.metrics import Metrics
from trainer_service.jobs import Plan, StepResult, TileResult, tile_tokens


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
            "Time of the engine; that of a pass is shared by tokens, that of steps equally",
            ["tenant"],
        )
        self._optim_steps = metrics.counter(
            "mint_usage_optim_steps", "Optimizer steps taken", ["tenant"]
        )

    def add_pass(
        self,
        plan: Plan,
        results: Sequence[TileResult],
        tenants: Sequence[str | None],
        elapsed_s: float,
    ) -> None:
        """Counts a pass; `tenants` are those of its tiles, None of what is done again."""
        tokens: Counter[str | None] = Counter()
        for tile, result, tenant in zip(plan.tiles, results, tenants, strict=True):
            tokens[tenant] += tile_tokens(tile)
            if result.error is None and tenant is not None:
                self._tokens.labels(tenant, "forward").inc(tile_tokens(tile))
                self._tokens.labels(tenant, "backward").inc(tile_tokens(tile) * tile.backward)
        self._share(tokens, elapsed_s)

    def add_steps(
        self, results: Sequence[StepResult], tenants: Sequence[str | None], elapsed_s: float
    ) -> None:
        """Counts optimizer steps; `tenants` are those of their runs."""
        for result, tenant in zip(results, tenants, strict=True):
            if tenant is not None:
                self._optim_steps.labels(tenant).inc(result.error is None)
        self._share(Counter(tenants), elapsed_s)

    def _share(self, parts: Counter[str | None], elapsed_s: float) -> None:
        for tenant, part in parts.items():
            if tenant is None:
                continue
            self._engine_seconds.labels(tenant).inc(elapsed_s * part / parts.total())

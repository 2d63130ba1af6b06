"""Metrics of a sampler's replicas."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mint_core.rpc.metrics import Metrics
from sampler_service.replicas.replica import Replica
from sampler_service.replicas.replicas import Replicas

_OF_EACH: Sequence[tuple[str, str, Callable[[Replica], float]]] = (
    ("mint_replica_ready", "1 while it is up", lambda each: each.engine.ready),
    (
        "mint_replica_restarts",
        "Times its engine was started again",
        lambda each: each.engine.restarts,
    ),
    (
        "mint_replica_tokens",
        "Tokens of requests under way there, as foreseen",
        lambda each: each.under_way.total(),
    ),
)


def watch_replicas(metrics: Metrics, replicas: Replicas) -> None:
    """Reports each, beside what `mint_engine_*` say of all."""
    metrics.table(
        "mint_replica_requests",
        "Requests given to a replica so far, by what it had of their adapter and prompt",
        ["replica", "adapter", "prompt"],
        lambda: replicas.found,
    )
    for name, help, read in _OF_EACH:
        metrics.table(name, help, ["replica"], partial(_read, replicas, read))


def _read(replicas: Replicas, read: Callable[[Replica], float]) -> Mapping[tuple[str, ...], float]:
    return {(each.name,): read(each) for each in replicas}

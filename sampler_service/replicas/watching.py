"""Metrics of a sampler that has several replicas."""

from mint_core.rpc.metrics import Metrics
from sampler_service.replicas.replica import Replica
from sampler_service.replicas.replicas import Replicas


def watch_replicas(metrics: Metrics, replicas: Replicas) -> None:
    """Reports each, beside what `mint_engine_*` say of all."""
    metrics.table(
        "mint_replica_requests",
        "Requests given to a replica so far, by what it had of their adapter and prompt",
        ["replica", "adapter", "prompt"],
        lambda: replicas.found,
    )
    for each in replicas:
        _watch(metrics, each)


def _watch(metrics: Metrics, replica: Replica) -> None:
    engine, name = replica.engine, replica.name
    metrics.gauge("mint_replica_ready", "1 while it is up", lambda: engine.ready, replica=name)
    metrics.gauge(
        "mint_replica_restarts",
        "Times its engine was started again",
        lambda: engine.restarts,
        replica=name,
    )
    metrics.gauge(
        "mint_replica_tokens",
        "Tokens of requests under way there, as foreseen",
        lambda: replica.under_way.total(),
        replica=name,
    )

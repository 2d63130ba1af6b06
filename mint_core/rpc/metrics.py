"""What Prometheus sees of a service."""

import ssl
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import prometheus_client as prometheus
import psutil
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mint_core.engine_host.view import EngineView
from mint_core.errors import FailedPrecondition
from mint_core.rpc.metrics_http import serve_http

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The metrics of one service, which moves `queue_depth` and counters of its own."""

    def __init__(self) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._gauges: dict[str, prometheus.Gauge] = {}
        self._limits: dict[str, Callable[[], float]] = {}
        prometheus.ProcessCollector(namespace="mint_front", registry=self._registry)
        self.calls = self.counter("mint_calls", "Calls ended", ["method", "code"])
        self.call_seconds = self.histogram(
            "mint_call_seconds", "Time from arrival to answer", ["method"]
        )
        self.queue_depth = prometheus.Gauge(
            "mint_queue_depth", "Calls accepted and not answered", registry=self._registry
        )

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> prometheus.Counter:
        """Makes a counter; its name gets `_total` at the end."""
        return prometheus.Counter(name, help, labels, registry=self._registry)

    def histogram(self, name: str, help: str, labels: Sequence[str] = ()) -> prometheus.Histogram:
        """Makes a histogram of seconds."""
        return prometheus.Histogram(name, help, labels, buckets=_SECONDS, registry=self._registry)

    def gauge(self, name: str, help: str, read: Callable[[], float], **labels: str) -> None:
        """Reports what `read` says whenever the metrics are read, under fixed labels."""
        if name not in self._gauges:
            self._gauges[name] = prometheus.Gauge(name, help, list(labels), registry=self._registry)
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set_function(read)

    def table(
        self,
        name: str,
        help: str,
        labels: Sequence[str],
        read: Callable[[], Mapping[tuple[str, ...], float]],
    ) -> None:
        """Reports what `read` says, by the labels' values, whenever the metrics are read."""
        self._registry.register(_Table(name, help, labels, read))

    def by_tenant(self) -> dict[str, dict[str, float]]:
        """What counters say of each tenant, by their names and other labels."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for family in self._registry.collect():
            for sample in family.samples:
                tenant = sample.labels.get("tenant")
                if family.type == "counter" and tenant and not sample.name.endswith("_created"):
                    rest = [f"{k}={v}" for k, v in sample.labels.items() if k != "tenant"]
                    name = sample.name + (f"{{{','.join(rest)}}}" if rest else "")
                    found[tenant][name] = sample.value
        return found

    def memory_limit(self, of: str, read: Callable[[], float]) -> None:
        """Reports the most memory that something may take, in bytes."""
        self._limits[of] = read
        self.gauge("mint_memory_limit_bytes", "Most memory that it takes", read, of=of)

    def memory_limits(self) -> dict[str, float]:
        """In bytes, by what they are for."""
        return {of: read() for of, read in self._limits.items()}

    def watch_engine(self, engine: EngineView) -> None:
        """Reports the engine's readiness, restarts and memory whenever the metrics are read."""
        self.gauge("mint_engine_ready", "1 while the engine is up", lambda: engine.ready)
        self.gauge(
            "mint_engine_restarts", "Times the engine was started again", lambda: engine.restarts
        )
        self.gauge(
            "mint_engine_resident_memory_bytes",
            "Main memory of the engine process",
            lambda: sum(map(_resident_bytes, engine.pids)),
        )

    def serve(
        self,
        address: str,
        tls: Callable[[], ssl.SSLContext] | None = None,
        sign: str = "metrics are at /metrics",
    ) -> int:
        """Answers HTTP on HOST:PORT from a thread of its own, or HTTPS by what `tls` says for each
        connection, and returns the port. `sign`: what it says where there are no metrics.
        """
        try:
            return serve_http(self._registry, address, tls, sign)
        except OSError as error:
            raise FailedPrecondition(
                f"`metrics_address` {address} cannot be listened on: {error.strerror};"
                " choose another, as `make serve PORT=50061` does for all",
                metrics_address=address,
            ) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Table(Collector):
    name: str
    help: str
    labels: Sequence[str]
    read: Callable[[], Mapping[tuple[str, ...], float]]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(self.name, self.help, labels=self.labels)
        for values, number in self.read().items():
            family.add_metric(values, number)
        yield family


def _resident_bytes(pid: int) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0.0

"""How long does a request wait for its first token when many are there? 64 requests at once, of two
tenants: one sends 48 of them first, the other 16 behind them. And how does that grow with their
number? A small model, 16 continuations at the same time; CPU seconds of the engine in process.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.comparison import Row, report
from benchmarks.workloads import make_small_model
from tests.models import VOCABULARY_SIZE
from tests.sampler_in_process import SamplerEngine

WAITING, FLOOD = 64, 48
CURVE = (16, 32, 64, 128)  # requests of one tenant
RUNNING, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 64, 32
ROUNDS = 5
FAIR = 1.5  # times the other tenant's p95


class Waits:
    """An engine, and requests that all come at once."""

    def __init__(self, model: Path) -> None:
        self._sampler = SamplerEngine(model, max_running_samples=RUNNING)
        self._rng = np.random.default_rng(0)

    def first_tokens_s(self, tenants: Sequence[str]) -> dict[str, list[float]]:
        """CPU seconds to the first token of each request, by tenant, in this order of arrival."""
        started = time.process_time()
        owners = {self._submit(tenant): tenant for tenant in tenants}
        waits: dict[str, list[float]] = {tenant: [] for tenant in tenants}
        seen: set[int] = set()
        while self._sampler.engine.busy:
            self._sampler.step()
            passed = time.process_time() - started
            for number in self._sampler.parts.keys() - seen:
                waits[owners[number]].append(passed)
                seen.add(number)
        self._sampler.parts.clear()
        return waits

    def _submit(self, tenant: str) -> int:
        prompt = self._rng.integers(3, VOCABULARY_SIZE, PROMPT_TOKENS).tolist()
        return self._sampler.submit(
            prompt, tenant=tenant, stream=True, max_tokens=OUTPUT_TOKENS, temperature=0.0
        )


def p95(times: Sequence[float]) -> float:
    return float(np.quantile(times, 0.95))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        waits = Waits(make_small_model(Path(folder)))
    crowd = ["flood"] * FLOOD + ["other"] * (WAITING - FLOOD)
    equal = ["one", "two"] * (WAITING // 2)
    waits.first_tokens_s(crowd)  # to warm up
    rows = []
    for name, tenants in (("one sends three quarters", crowd), ("both send as many", equal)):
        by_tenant: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for tenant, times in waits.first_tokens_s(tenants).items():
                by_tenant.setdefault(tenant, []).append(p95(times))
        (first, second) = (float(np.median(times)) for times in by_tenant.values())
        # Who sends more waits for its own requests: only what the other waits is to be fair.
        ratio = second / first
        title = f"p95 to the first token, 2 tenants, {WAITING} requests, {name}"
        rows.append(Row(title, second, first, ratio, FAIR, "CPU seconds", "lower"))
    alone = float(np.median([p95(waits.first_tokens_s(["one"])["one"]) for _ in range(ROUNDS)]))
    for count in CURVE:
        times = [p95(waits.first_tokens_s(["one"] * count)["one"]) for _ in range(ROUNDS)]
        ours = float(np.median(times))
        title = f"p95 to the first token, {count} requests at once"
        rows.append(Row(title, ours, alone, ours / alone, None, "CPU seconds", "lower"))
    report(rows)


if __name__ == "__main__":
    main()

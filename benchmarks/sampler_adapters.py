"""Do a thousand adapters slow the sampler down, of which it holds 64? SmolLM2, rank 4 on all linear
layers and the head, over gRPC, one thread.

Requests, 32 at a time, ask for one adapter after the other. With more than 64 of them each has to
be fetched: from the store the first time, from a row file later. Output tokens per CPU second of
the sampler, front and engine.
"""

import argparse
import itertools
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import psutil

from benchmarks.comparison import Row, report
from benchmarks.sampler_workloads import END_TOKEN, FIRST_TOKEN
from benchmarks.workloads import SMOLLM2
from mint_core.lora.spec import LoraRequest
from mint_core.lora.targets import initial_arrays, resolve
from tests.engines_in_process import random_arrays
from tests.models import load_base
from tests.samplers import Sampler, connected, sample_request
from tests.servers import running_sampler

RESIDENT, RANK = 64, 4
TOGETHER = 32  # requests
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 8
LIMIT_S = 1200.0


def publish(sampler: Sampler, count: int) -> list[str]:
    """Adapters of different names and tenants' runs; their numbers are the same."""
    base = load_base(SMOLLM2, device="cpu", dtype="float32", max_lora_rank=RANK)
    spec = resolve(LoraRequest(rank=RANK, seed=0), base.description.linear_modules)
    weights = random_arrays(initial_arrays(spec, base.shapes), 0)
    return [sampler.publish(f"r-{i}", seed=i, spec=spec, weights=weights) for i in range(count)]


class Load:
    """Requests, TOGETHER of them at a time."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._rng = np.random.default_rng(0)
        front = psutil.Process(sampler.service.process.pid)
        self._processes = [front, *front.children()]

    def tokens_per_cpu_s(self, paths: Sequence[str], requests: int) -> float:
        started_s = self._cpu_s()
        tokens = 0
        calls: deque[grpc.Future] = deque()
        for path in itertools.islice(itertools.cycle(paths), requests):
            if len(calls) == TOGETHER:
                tokens += _tokens(calls.popleft())
            calls.append(self._start(path))
        tokens += sum(map(_tokens, calls))
        return tokens / (self._cpu_s() - started_s)

    def _start(self, path: str) -> grpc.Future:
        prompt = self._rng.integers(FIRST_TOKEN, END_TOKEN, PROMPT_TOKENS).tolist()
        request = sample_request(
            tuple(prompt), params={"max_tokens": OUTPUT_TOKENS}, model_path=path
        )
        return self._sampler.stub.Sample.future(request, timeout=LIMIT_S)

    def _cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(t.user + t.system for t in times)


def _tokens(call: grpc.Future) -> int:
    return sum(len(sequence.tokens) for sequence in call.result().sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=320, help="of each measurement")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        running_sampler(
            SMOLLM2, Path(name), max_adapters=RESIDENT, kv_cache_tokens=16_384
        ) as service,
        connected(service, Path(name)) as sampler,
    ):
        paths = publish(sampler, arguments.adapters)
        load, requests = Load(sampler), arguments.requests
        many = [paths[i * len(paths) // requests] for i in range(requests)]  # each once
        few = paths[-RESIDENT:]
        first = load.tokens_per_cpu_s(many, requests)
        load.tokens_per_cpu_s(few, RESIDENT)
        resident = load.tokens_per_cpu_s(few, requests)
        again = load.tokens_per_cpu_s(many, requests)
    total = f"{arguments.adapters} adapters, 64 resident"
    unit = "tokens per CPU second"
    report(
        [
            Row(f"{total}: from row files", again, resident, again / resident, None, unit),
            Row(f"{total}: first use", first, resident, first / resident, None, unit),
        ]
    )


if __name__ == "__main__":
    main()

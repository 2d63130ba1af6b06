"""What do two replicas cost against one? `python -m benchmarks.replicas COUNT`, SmolLM2, over gRPC.

Users talk to adapters, turn by turn: each prompt is the adapter's own beginning, all that was said
before and something new. As many users for each replica. Tokens of prompts and answers per CPU
second of the engines, and how often a request came where its adapter and its prompt were.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from benchmarks.sampler_adapters import publish
from benchmarks.sampler_workloads import END_TOKEN, FIRST_TOKEN
from benchmarks.workloads import SMOLLM2
from tests.metrics import Samples, scrape, value
from tests.samplers import Sampler, connected, sample_request
from tests.servers import running_sampler

USERS, ADAPTERS, TURNS = 8, 6, 6  # users and adapters of each replica
BEGINNING_TOKENS, NEW_TOKENS, ANSWER_TOKENS = 256, 32, 16
LIMIT_S = 1200.0


def talk(sampler: Sampler, path: str, adapter: int, user: int) -> None:
    """The turns of one user."""
    prompt = _tokens(adapter, BEGINNING_TOKENS)
    for turn in range(TURNS):
        prompt += _tokens(1000 + user * TURNS + turn, NEW_TOKENS)
        params = {"max_tokens": ANSWER_TOKENS, "seed": user}
        request = sample_request(tuple(prompt), params=params, model_path=path)
        answer = sampler.stub.Sample(request, timeout=LIMIT_S)
        prompt += answer.sequences[0].tokens


def _tokens(seed: int, count: int) -> list[int]:
    drawn = np.random.default_rng(seed).integers(FIRST_TOKEN, END_TOKEN, count)
    return [int(token) for token in drawn]


def measure(replicas: int, folder: Path) -> dict[str, object]:
    flags = {"base_model_name": "tiny", "max_lora_rank": 4, "replicas": replicas}
    with (
        running_sampler(SMOLLM2, folder, **flags) as service,
        connected(service, folder) as sampler,
    ):
        paths = publish(sampler, ADAPTERS * replicas)
        engines = _engines(service.process.pid)
        before_s = _cpu_s(engines)
        users = range(USERS * replicas)
        with ThreadPoolExecutor(len(users)) as pool:
            adapters = [user % len(paths) for user in users]
            list(pool.map(lambda u, a: talk(sampler, paths[a], a, u), users, adapters))
        cpu_s = [after - before for after, before in zip(_cpu_s(engines), before_s, strict=True)]
        seen = scrape(service.metrics_address)
    prompt, cached, sampled = (
        value(seen, "mint_tokens_total", kind=kind)
        for kind in ("prompt", "prompt_cached", "sampled")
    )
    return {
        "name": f"{replicas} replicas",
        "tokens_per_cpu_s": round((prompt + sampled) / sum(cpu_s), 1),
        "computed_tokens_per_cpu_s": round((prompt - cached + sampled) / sum(cpu_s), 1),
        "prompt_cached": round(cached / prompt, 3),
        "engines_cpu_s": [round(each, 1) for each in cpu_s],
        **{what: round(_found(seen, what, how), 3) for what, how in _FOUND},
    }


_FOUND = (("adapter", "there"), ("prompt", "kept"))


def _found(seen: Samples, what: str, how: str) -> float:
    """The share of requests that found it; 1 where there is one replica alone."""
    counts = {labels: n for (name, labels), n in seen.items() if name == "mint_replica_requests"}
    found = sum(n for labels, n in counts.items() if dict(labels)[what] == how)
    return found / sum(counts.values()) if counts else 1.0


def _engines(front: int) -> Sequence[psutil.Process]:
    children = psutil.Process(front).children()
    return [each for each in children if "sampler_service.engine" in each.cmdline()]


def _cpu_s(processes: Sequence[psutil.Process]) -> list[float]:
    return [sum(process.cpu_times()[:2]) for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("replicas", type=int, nargs="+")
    for count in parser.parse_args().replicas:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(count, Path(folder))), flush=True)


if __name__ == "__main__":
    main()

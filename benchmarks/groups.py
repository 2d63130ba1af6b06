"""Two groups on two cores against one: which share of the time engines compute, and how many tokens
they compute per second of their CPU's, over gRPC with a tiny model.

`python -m benchmarks.groups [--seconds 60] [--users 8] [--rounds 2]`. Each user sends batches
without end. One and two take turns; the ratio is that of the rounds' means.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from urllib.request import urlopen

import psutil

import mint
from benchmarks.trainer_fairness import some
from mint import types
from tests.models import tiny_qwen3
from tests.servers import RunningService, running_trainer

TOKENS, AHEAD, WARM_UP_S = 4096, 3, 5.0
ADAM = types.AdamParams(learning_rate=1e-4)


def total(service: RunningService, name: str) -> float:
    """Of all groups."""
    with urlopen(f"http://{service.metrics_address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def cpu_s(service: RunningService) -> tuple[float, float]:
    """Of the engines, and of the front."""
    front = psutil.Process(service.process.pid)
    engines = [c.cpu_times() for c in front.children() if "trainer_service.engine" in c.cmdline()]
    own = front.cpu_times()
    return sum(each.user + each.system for each in engines), own.user + own.system


def train(run: mint.TrainingClient, seed: int, stopped: threading.Event) -> None:
    batch, waiting = some(TOKENS, seed), []
    while not stopped.is_set():
        run.forward_backward(batch)
        waiting.append(run.optim_step(ADAM))
        if len(waiting) > AHEAD:
            waiting.pop(0).result()


def measure(folder: Path, groups: int, users: int, seconds: float) -> Mapping[str, float]:
    stopped = threading.Event()
    with (
        tempfile.TemporaryDirectory() as store,
        running_trainer(folder / "model", store, groups=groups) as service,
        mint.ServiceClient(base_url=service.address) as client,
    ):
        runs = [client.create_lora_training_client(rank=8, seed=seed) for seed in range(users)]
        threads = [
            threading.Thread(target=train, args=(run, seed, stopped))
            for seed, run in enumerate(runs)
        ]
        for thread in threads:
            thread.start()
        time.sleep(WARM_UP_S)
        before = (time.monotonic(), total(service, "mint_group_tokens"), *cpu_s(service))
        busy_s = total(service, "mint_group_busy_seconds")
        time.sleep(seconds)
        after = (time.monotonic(), total(service, "mint_group_tokens"), *cpu_s(service))
        busy_s = total(service, "mint_group_busy_seconds") - busy_s
        stopped.set()
        for thread in threads:
            thread.join()
    wall_s, tokens, engine_s, front_s = (b - a for a, b in zip(before, after, strict=True))
    return {
        "groups": groups,
        "busy_share": round(busy_s / wall_s / groups, 3),  # of all engines' time
        "tokens_per_s": round(tokens / wall_s),
        "tokens_per_engine_cpu_s": round(tokens / engine_s),
        "front_cpu_share": round(front_s / wall_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        tiny_qwen3(Path(name) / "model")
        for groups in (1, 2) * options.rounds:
            row = measure(Path(name), groups, options.users, options.seconds)
            rates[groups].append(row["tokens_per_engine_cpu_s"])
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    ratio = fmean(rates[2]) / fmean(rates[1])
    sys.stdout.write(json.dumps({"of_two_to_one": round(ratio, 3)}) + "\n")


if __name__ == "__main__":
    main()

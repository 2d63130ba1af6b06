"""How many training runs can live on one small machine? 200 of rank 16 on SmolLM2, in 8 GiB.

With moments and gradients they take 18 GB. All take the same steps at the same time, a few are
sampled from at the end, and meanwhile the resident memory of trainer and sampler, fronts and
engines, is added up. Pages that processes share are counted for each of them; files in the
system's cache are not counted.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil

import mint
from mint import types
from tests.servers import running_sampler, running_trainer

MODEL = Path(".models/SmolLM2-135M-Instruct")
RANK, STEPS, TOKENS, SAMPLED = 16, 2, 16, 8
LIMIT_GIB = 8.0
TRAINER = {"row_memory_mib": 4096, "max_batch_tokens": 512}
SAMPLER = {"adapter_memory_mib": 256, "kv_cache_tokens": 16_384}


class Memory:
    """Watches the resident memory of processes and of their children."""

    def __init__(self, *pids: int) -> None:
        self._parents = [psutil.Process(pid) for pid in pids]
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            family = [p for parent in self._parents for p in (parent, *parent.children())]
            self.peak_bytes = max(self.peak_bytes, sum(p.memory_info().rss for p in family))


def make_datum(seed: int) -> types.Datum:
    tokens = np.random.default_rng(seed).integers(100, 40_000, TOKENS + 1).tolist()
    given = {"target_tokens": tokens[1:], "weights": [1.0] * TOKENS}
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), given)


def train(clients: list[mint.TrainingClient]) -> list[list[float]]:
    """All at once, STEPS times and one look more; the losses of each run."""
    losses: list[list[float]] = [[] for _ in clients]
    params = types.AdamParams(learning_rate=1e-3)
    for step in range(STEPS + 1):
        last, started = step == STEPS, time.perf_counter()
        computed, stepped = [], []
        for seed, client in enumerate(clients):
            call = client.forward if last else client.forward_backward
            computed.append(call([make_datum(seed)], loss_fn="cross_entropy"))
            if not last:
                stepped.append(client.optim_step(params))
        for run, future in zip(losses, computed, strict=True):
            run.append(future.result().metrics["loss:sum"])
        assert all(future.result().metrics["grad_norm:mean"] > 0 for future in stepped)
        print(f"{'look' if last else 'step'} {step}: {time.perf_counter() - started:.0f} s")
    return losses


def sample(clients: list[mint.TrainingClient]) -> None:
    params = types.SamplingParams(max_tokens=4, seed=0)
    for client in clients:
        sampler = client.save_weights_and_get_sampling_client()
        samples = sampler.sample(types.ModelInput.from_ints([100]), 1, params)
        assert samples.result().sequences[0].tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as name,
        running_sampler(MODEL, Path(name), **SAMPLER) as sampler,
        running_trainer(MODEL, Path(name), sampler_address=sampler.address, **TRAINER) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        memory = Memory(trainer.process.pid, sampler.process.pid)
        clients = [service.create_lora_training_client(rank=RANK, seed=i) for i in range(runs)]
        print(f"{runs} runs made: {time.perf_counter() - started:.0f} s")
        losses = train(clients)
        sample(clients[:SAMPLED])
        with urlopen(f"http://{trainer.metrics_address}/metrics") as answer:
            print(*(line for line in answer.read().decode().splitlines() if "mint_rows{" in line))
        memory.stop()
    improved = sum(run[-1] < run[0] for run in losses)
    peak_gib = memory.peak_bytes / 2**30
    seconds = time.perf_counter() - started
    print(f"loss fell: {improved} of {runs}; peak {peak_gib:.2f} GiB resident; {seconds:.0f} s")
    rows = [
        {"name": f"{runs} resident runs: GiB", "ours": round(peak_gib, 2), "baseline": LIMIT_GIB},
        {"name": f"{runs} resident runs: loss fell", "ours": improved, "baseline": runs},
    ]
    targets = [{"better": "lower", "target": 1.0}, {"target": 1.0}]
    for row, target in zip(rows, targets, strict=True):
        ratio = float(row["ours"]) / float(row["baseline"])  # type: ignore[arg-type]
        print(json.dumps(row | {"ratio": round(ratio, 3)} | target))


if __name__ == "__main__":
    main()

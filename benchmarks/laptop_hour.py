"""`python -m benchmarks.laptop_hour MINUTES`: what both services hold of a laptop's memory, with
the options that they have by default, while somebody trains, samples, saves and downloads.

SmolLM2, one adapter after the other, with prompts from some words to some pages; resident MiB of
each process, a line a minute.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

import mint
from benchmarks.workloads import SMOLLM2
from mint import types
from tests.servers import RunningService, running_sampler, running_trainer

LEAST_TOKEN, MOST_TOKEN = 100, 49_000  # ordinary ones of SmolLM2
MIB = 2**20


def tokens(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randint(LEAST_TOKEN, MOST_TOKEN) for _ in range(rng.randint(least, most))]


def datum(rng: random.Random) -> types.Datum:
    document = tokens(rng, 16, 512)
    return types.Datum(
        model_input=types.ModelInput.from_ints(document[:-1]),
        loss_fn_inputs={"target_tokens": document[1:], "weights": [1.0] * (len(document) - 1)},
    )


def mixed_use(service: mint.ServiceClient, seed: int) -> Iterator[None]:
    """One adapter's life; yields between two things."""
    rng = random.Random(seed)
    training = service.create_lora_training_client(rank=rng.choice([8, 16, 32]))
    for step in range(4):
        training.forward_backward([datum(rng) for _ in range(rng.randint(1, 8))], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-4)).result()
        yield
        sampler = training.save_weights_and_get_sampling_client(name=f"step-{step}")
        prompt = types.ModelInput.from_ints(tokens(rng, 16, 3000))
        params = types.SamplingParams(max_tokens=rng.randint(16, 128), temperature=0.8)
        sampler.sample(prompt, rng.choice([1, 4, 16]), params).result()
        yield
        sampler.compute_logprobs(prompt).result()
        for _ in sampler.sample_stream(prompt, 1, params):
            pass
        yield
    saved = training.save_state(f"whole-{seed}").result()
    rest = service.create_rest_client()
    with tempfile.TemporaryDirectory() as folder:
        rest.download_checkpoint(saved.path, Path(folder, "checkpoint")).result()
    yield


def resident(services: dict[str, RunningService]) -> dict[str, int]:
    """MiB of each front, and of its engine."""
    row = {}
    for name, service in services.items():
        front = psutil.Process(service.process.pid)
        row[f"{name} front"] = front.memory_info().rss // MIB
        row[f"{name} engine"] = max(
            child.memory_info().rss // MIB for child in front.children(recursive=True)
        )
    return row


def main() -> None:
    minutes = float(sys.argv[1])
    with (
        tempfile.TemporaryDirectory() as folder,
        running_sampler(SMOLLM2, Path(folder, "store")) as sampler,
        running_trainer(SMOLLM2, Path(folder, "store"), sampler_address=sampler.address) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        services = {"trainer": trainer, "sampler": sampler}
        began_s, told, done = time.monotonic(), 0, 0
        most: dict[str, int] = {}
        for seed in range(10**6):
            for _ in mixed_use(service, seed):
                done += 1
                elapsed = (time.monotonic() - began_s) / 60
                row = resident(services)
                most = {name: max(row[name], most.get(name, 0)) for name in row}
                if elapsed >= told:
                    told = int(elapsed) + 1
                    print(json.dumps({"minutes": round(elapsed, 1), "done": done, **row}))
                    sys.stdout.flush()
                if elapsed >= minutes:
                    print(json.dumps({"minutes": round(elapsed, 1), "done": done, "most": most}))
                    return


if __name__ == "__main__":
    main()

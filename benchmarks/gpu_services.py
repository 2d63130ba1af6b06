"""The parts of the checklist that run both services on the device, over gRPC: tenants of
reinforcement learning together against one after the other, small calls, new weights, a killed
engine.
"""

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

import mint
from benchmarks.gpu_models import CONFIGS, Bench, make_model
from mint import types
from tests.metrics import scrape, value
from tests.models import write_tokenizer
from tests.servers import RunningService, running_sampler, running_trainer

RANK, TENANTS = 32, 8
ADAM = types.AdamParams(learning_rate=1e-5)
SHARE = 0.4  # of the device's memory, for each service


@dataclass(frozen=True)
class Sizes:
    steps: int  # of each tenant's loop
    prompts: int  # of a step
    samples: int  # of a prompt
    prompt_tokens: int
    new_tokens: int
    small_calls: int
    handovers: int


REAL = Sizes(2, 4, 4, 128, 128, 100, 20)  # with both starts within the minute of a part
REHEARSED = Sizes(1, 1, 2, 8, 4, 3, 2)


@dataclass(frozen=True)
class Stage:
    bench: Bench
    trainer: RunningService
    client: mint.ServiceClient
    sizes: Sizes

    def prompt(self, rng: random.Random) -> types.ModelInput:
        return types.ModelInput.from_ints(rng.choices(range(5, 500), k=self.sizes.prompt_tokens))

    def learn(self, training: mint.TrainingClient, seed: int) -> None:
        """One tenant's loop: sample with the weights as they are, reward, step."""
        rng, sizes = random.Random(seed), self.sizes
        params = types.SamplingParams(max_tokens=sizes.new_tokens, temperature=1.0, stop=[])
        for _ in range(sizes.steps):
            sampling = training.save_weights_and_get_sampling_client()
            prompts = [self.prompt(rng) for _ in range(sizes.prompts)]
            asked = [sampling.sample(prompt, sizes.samples, params) for prompt in prompts]
            data = [
                rewarded(prompt.to_ints(), sequence, rng.choice((-1.0, 1.0)))
                for prompt, answer in zip(prompts, asked, strict=True)
                for sequence in answer.result().sequences
            ]
            training.forward_backward(data, "importance_sampling")
            training.optim_step(ADAM).result()


def rewarded(prompt: Sequence[int], sequence: types.SampledSequence, reward: float) -> types.Datum:
    tokens, before = [*prompt, *sequence.tokens], len(prompt) - 1
    assert sequence.logprobs is not None
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + list(sequence.logprobs),
            "advantages": [0.0] * before + [reward] * len(sequence.tokens),
        },
    )


def services(bench: Bench) -> None:
    """Qwen3-0.6B's shape, both services on one device, rank 32 on all linear layers."""
    with staged(bench) as stage:
        small_calls(stage)
        new_weights(stage)
        tenants(stage)


def recovery(bench: Bench) -> None:
    """The same, and the trainer's engine killed."""
    with staged(bench) as stage:
        killed_engine(stage)


@contextmanager
def staged(bench: Bench) -> Iterator[Stage]:
    flags: dict[str, object] = {"device": str(bench.device), "dtype": "bfloat16"}
    flags |= {"dtype": "float32"} if bench.tiny else {"memory_share": SHARE}
    with tempfile.TemporaryDirectory() as name:
        model, store = Path(name, "model"), Path(name, "store")
        make_model(CONFIGS["tiny" if bench.tiny else "0.6B"], bench.device).save_pretrained(model)
        write_tokenizer(model)
        with (
            running_sampler(model, store, base_model_name="random", **flags) as sampler,
            running_trainer(
                model, store, base_model_name="random", sampler_address=sampler.address, **flags
            ) as trainer,
            mint.ServiceClient(base_url=trainer.address) as client,
        ):
            yield Stage(bench, trainer, client, REHEARSED if bench.tiny else REAL)


def tenants(stage: Stage) -> None:
    runs = [stage.client.create_lora_training_client(rank=RANK, seed=n) for n in range(TENANTS)]
    with ThreadPoolExecutor(TENANTS) as pool:
        list(pool.map(stage.learn, runs, range(TENANTS)))  # warms up
        started = time.perf_counter()
        list(pool.map(stage.learn, runs, range(TENANTS)))
        together_s = time.perf_counter() - started
    started = time.perf_counter()
    for number, run in enumerate(runs):
        stage.learn(run, number)
    alone_s = time.perf_counter() - started
    stage.bench.note(f"{TENANTS} RL tenants together", together_s, "s")
    stage.bench.note("  against one after the other", alone_s / together_s, "x", ">= 4")


def small_calls(stage: Stage) -> None:
    training = stage.client.create_lora_training_client(rank=RANK)
    tokens = random.Random(0).choices(range(5, 500), k=65)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 64},
        )
    ]
    times = []
    for _ in range(stage.sizes.small_calls + 3):
        started = time.perf_counter()
        training.forward_backward(data, "cross_entropy").result()
        times.append(1e3 * (time.perf_counter() - started))
    for share in (0.5, 0.99):
        milliseconds = float(np.quantile(times[3:], share))
        stage.bench.note(f"forward_backward of 64 tokens, p{share * 100:.0f}", milliseconds, "ms")


def new_weights(stage: Stage) -> None:
    """Publish to first token, and what a request of the same length takes on weights there."""
    training = stage.client.create_lora_training_client(rank=RANK)
    params, rng = types.SamplingParams(max_tokens=1, seed=0, stop=[]), random.Random(1)
    new, there = [], []
    for _ in range(stage.sizes.handovers):
        started = time.perf_counter()
        sampling = training.save_weights_and_get_sampling_client()
        sampling.sample(stage.prompt(rng), 1, params).result()
        new.append(1e3 * (time.perf_counter() - started))
        started = time.perf_counter()
        sampling.sample(stage.prompt(rng), 1, params).result()
        there.append(1e3 * (time.perf_counter() - started))
    stage.bench.note("publish to first token", float(np.median(new)), "ms", "<= 25")
    stage.bench.note("  the token on weights there", float(np.median(there)), "ms")


def killed_engine(stage: Stage) -> None:
    """An isolated run's steps are computed again: to the bit, says the digest of its weights."""
    training = stage.client.create_lora_training_client(rank=RANK, isolated=True)
    stage.learn(training, 2)
    front = psutil.Process(stage.trainer.process.pid)
    (engine,) = (c for c in front.children() if "trainer_service.engine" in c.cmdline())
    started = time.perf_counter()
    engine.kill()
    stage.learn(training, 3)
    stage.bench.note("kill -9 of the engine, a loop behind it", time.perf_counter() - started, "s")
    inexact = value(scrape(stage.trainer.metrics_address), "mint_inexact_replays")
    stage.bench.note("  rows not to the bit what they were", inexact, "rows", "0")

"""How long does it take from the trainer's weights to the first token that is sampled from them?

Trainer and sampler on one host, SmolLM2, rank 32 on all linear layers and the head, one thread
each, over gRPC. What publishing adds is the time from `save_weights_and_get_sampling_client` to the
first token, less that of a request of the same length on weights that are there: a prefill and a
decode step. Against it stand saving and loading a PEFT folder, in one process and without a model's
pass. Milliseconds of wall time, in turn: a machine with other work shows that work.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import mint
from benchmarks.comparison import Row, report
from benchmarks.sampler_workloads import END_TOKEN, FIRST_TOKEN
from benchmarks.workloads import SMOLLM2
from mint import types
from tests.servers import running_sampler, running_trainer

RANK, PROMPT_TOKENS, ROUNDS = 32, 16, 15
TARGET_MS = 50.0  # beyond a prefill and a decode step
PAUSE_S = 1.0  # between rounds: what is stored behind the acknowledgement is no part of the next
TRAINER = {"max_batch_tokens": 512, "row_memory_mib": 1024}
SAMPLER = {"kv_cache_tokens": 16_384}


def elapsed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


class PeftFolder:
    """A trained adapter, and another model that is to get it, as in two processes."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._trained, self._serving = self._model(), self._model()
        self._count = 0

    def _model(self) -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
        names = [n.split(".")[-1] for n, m in base.named_modules() if type(m) is torch.nn.Linear]
        return get_peft_model(base, LoraConfig(r=RANK, target_modules=sorted(set(names))))

    def hand_over(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._count += 1
            self._trained.save_pretrained(folder, save_embedding_layers=False)
            self._serving.load_adapter(folder, str(self._count))
            self._serving.set_adapter(str(self._count))
        if self._count > 1:
            self._serving.delete_adapter(str(self._count - 1))


class Services:
    """A run, and the sampler that gets its weights."""

    def __init__(self, training: mint.TrainingClient) -> None:
        self._training = training
        self._sampling: mint.SamplingClient | None = None
        self._rng = np.random.default_rng(0)

    def publish_and_sample(self) -> None:
        self._sampling = self._training.save_weights_and_get_sampling_client()
        self.sample()

    def sample(self) -> None:
        assert self._sampling is not None
        tokens = self._rng.integers(FIRST_TOKEN, END_TOKEN, PROMPT_TOKENS).tolist()
        prompt = types.ModelInput.from_ints(tokens)
        self._sampling.sample(prompt, 1, types.SamplingParams(max_tokens=1, seed=0)).result()


def measure(services: Services, folder: PeftFolder) -> list[list[float]]:
    """Of each round: publishing to first token, the same without publishing, the PEFT folder."""
    rounds = []
    for _ in range(ROUNDS + 1):
        first = elapsed_ms(services.publish_and_sample)
        time.sleep(PAUSE_S)
        rounds.append([first, elapsed_ms(services.sample), elapsed_ms(folder.hand_over)])
    return rounds[1:]  # the first warms up


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as store,
        running_sampler(SMOLLM2, Path(store), **SAMPLER) as sampler,
        running_trainer(
            SMOLLM2, Path(store), sampler_address=sampler.address, **TRAINER
        ) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        services = Services(service.create_lora_training_client(rank=RANK))
        first, there, peft = zip(*measure(services, PeftFolder()), strict=True)
    added = statistics.median(f - t for f, t in zip(first, there, strict=True))
    ours, limit = statistics.median(first), TARGET_MS + statistics.median(there)
    folder = statistics.median(peft)
    report(
        [
            Row("publish to first token", ours, limit, ours / limit, 1.0, "ms", "lower"),
            Row("publishing, against a PEFT folder", added, folder, folder / added, 5.0, "ms"),
        ]
    )


if __name__ == "__main__":
    main()

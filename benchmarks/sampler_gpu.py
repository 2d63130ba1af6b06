"""What does a step of decoding take on a GPU? Qwen3's shapes with random weights in bfloat16, 1,024
tokens of context, rank 32 on all linear layers and the head: against the bytes that a step must
read, with eight adapters against none, and recorded in a CUDA graph against launched one by one.

    python -m benchmarks.sampler_gpu [0.6B] [8B]

Steps are the engine's, sampling and bookkeeping included; services and prompts are left out. Has
not run yet: it was written without a GPU at hand.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.comparison import Row, report
from mint_core.lora.bank import AdapterRow
from mint_core.lora.spec import LoraRequest
from sampler_service.engine.decoder import Decoded, Decoder
from sampler_service.engine.kv_cache import layer_shapes
from sampler_service.engine.sequences import Span
from sampler_service.jobs import BASE_MODEL
from tests.engines_in_process import make_engine, score
from tests.models import write_tokenizer
from tests.sampler_in_process import SamplerEngine

CONTEXT, STEPS, WARM_UP = 1024, 64, 8
BATCHES = (1, 32, 128, 256)
RANK, ADAPTERS = 32, 8
COPIED_BYTES = 4 * 1024**3  # to see how fast memory is
_SHARED = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "eos_token_id": 2}
MODELS = {
    "0.6B": Qwen3Config(
        **_SHARED,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "8B": Qwen3Config(
        **_SHARED,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}
# Tokens per second at batch 256, and shares of the byte bound, by model and batch.
TARGET_RATE = {"0.6B": 20_000.0}
TARGET_SHARE = {("8B", 128): 0.65}


class CountingDecoder:
    """Notes how many rows the last pass had."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.rows = 0

    def run(self, spans: Sequence[Span], adapters: Mapping[str, AdapterRow]) -> Decoded:
        self.rows = len(spans)
        return self._decoder.run(spans, adapters)


class Workload:
    """An engine with adapters, all of whose sequences decode at the same time."""

    def __init__(self, folder: Path, device: str = "cuda") -> None:
        self.sampler = SamplerEngine(
            folder,
            device=device,
            dtype="bfloat16",
            max_running_samples=max(BATCHES),
            max_batch_tokens=max(BATCHES) + 32 * CONTEXT,
            kv_cache_tokens=max(BATCHES) * (CONTEXT + 4 * STEPS),
        )
        for number in range(ADAPTERS):
            self.sampler.load(f"adapter-{number}", LoraRequest(rank=RANK), random=number)
        runner = self.sampler.engine._runner
        assert runner._decoder is not None
        self.decoder = runner._decoder
        self._counting = CountingDecoder(self.decoder)
        runner._decoder = self._counting  # type: ignore[assignment]

    def step_s(self, batch: int, adapters: int) -> float:
        """Seconds of a step in which so many sequences decode."""
        rng = np.random.default_rng(batch)
        for number in range(batch):
            self.sampler.submit(
                rng.integers(3, self.sampler.model.vocabulary_size, CONTEXT).tolist(),
                adapter=f"adapter-{number % adapters}" if adapters else BASE_MODEL,
                max_tokens=3 * STEPS,  # the first ones decode while the last ones' prompts wait
                seed=number,
            )
        times = []
        while self.sampler.engine.busy:
            self._counting.rows = 0
            started = time.perf_counter()
            self.sampler.step()  # ends with what was drawn on the host
            if self._counting.rows == batch:
                times.append(time.perf_counter() - started)
        assert len(times) >= STEPS, "not all decoded at the same time for long enough"
        return statistics.median(times[WARM_UP:STEPS])

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Passes are launched kernel by kernel."""
        kept = self.decoder._recorder, self.decoder._passes
        self.decoder._recorder, self.decoder._passes = None, {}
        yield
        self.decoder._recorder, self.decoder._passes = kept

    def bound_bytes(self, batch: int, adapters: int) -> float:
        """What a step reads at least: weights, keys and values, adapters."""
        base = self.sampler.engine.base
        weights = sum(s.in_features * s.out_features for s in base.shapes.values())
        ranks = RANK * sum(s.in_features + s.out_features for s in base.shapes.values())
        token_bytes = sum(shape.token_bytes for shape in layer_shapes(base).values())
        return 2.0 * (weights + min(batch, adapters) * ranks) + batch * CONTEXT * token_bytes


def measure(name: str, work: Workload, bytes_per_s: float) -> Iterator[Row]:
    for batch in BATCHES:
        base_s, own_s = work.step_s(batch, 0), work.step_s(batch, ADAPTERS)
        rate, bound = batch / own_s, batch * bytes_per_s / work.bound_bytes(batch, ADAPTERS)
        title = f"{name}, batch {batch}, {min(batch, ADAPTERS)} adapters"
        share = TARGET_SHARE.get((name, batch))
        yield Row(f"{title}, of the byte bound", rate, bound, rate / bound, share, "tokens/s")
        base_rate = batch / base_s
        yield Row(f"{title}, of the base", rate, base_rate, rate / base_rate, 0.85, "tokens/s")
        if batch == 256 and name in TARGET_RATE:
            goal = TARGET_RATE[name]
            yield Row(f"{title}, of the goal", rate, goal, rate / goal, 1.0, "tokens/s")
    for batch in BATCHES[:2]:
        graph_s = work.step_s(batch, 0)
        with work.launching():
            launched_s = work.step_s(batch, 0)
        ratio = launched_s / graph_s
        yield Row(f"{name}, batch {batch}, recorded", graph_s, launched_s, ratio, 5.0, "seconds")


def gap(name: str, work: Workload, folder: Path, device: str = "cuda") -> Row:
    """How far the sampler's logprobs are from the trainer's."""
    prompt = list(range(3, 3 + CONTEXT))
    path = "adapter-0"
    generated = work.sampler.generate(prompt, adapter=path, max_tokens=STEPS, prompt_logprobs=True)
    (continuation,) = generated.continuations
    assert generated.prompt_logprobs is not None
    trained = score(
        make_engine(folder, device=device, dtype="bfloat16"),
        [*prompt, *continuation.tokens],
        work.sampler.row(path).spec,
        work.sampler.arrays[path],
    )
    ours = np.concatenate([generated.prompt_logprobs, continuation.model_logprobs])
    mean = float(np.abs(ours - trained).mean())
    title = f"{name}, mean gap of logprobs to the trainer's"
    return Row(title, mean, 1.0, mean, 1e-2, "nats", "lower")


def memory_bytes_per_s() -> float:
    """How fast this GPU reads and writes, by a copy."""
    numbers = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(numbers)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        copy.copy_(numbers)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * COPIED_BYTES / min(times)


def write_model(folder: Path, config: Qwen3Config, device: str = "cuda") -> None:
    """A model of random weights, made where that is quick."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU, and torch sees none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    bytes_per_s = memory_bytes_per_s()
    print(f"memory {bytes_per_s / 1e12:.2f} TB/s")
    rows: list[Row] = []
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), MODELS[name])
            work = Workload(Path(folder))
            rows += measure(name, work, bytes_per_s)
            if name == "0.6B":
                rows.append(gap(name, work, Path(folder)))
            del work  # before the next one needs its memory
    report(rows)


if __name__ == "__main__":
    main()

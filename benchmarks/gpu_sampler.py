"""Parts of the checklist that sample: steps of decoding against the bytes they read, adapters,
graphs; how far logprobs are from the trainer's; how soon new weights are in use.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.gpu_models import Bench, copied_bytes_per_s, random_model
from benchmarks.gpu_trainer import profiled
from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.spec import LoraRequest
from mint_core.lora.targets import resolve
from mint_core.model.recordings import Recordings
from sampler_service.engine import memory
from sampler_service.engine.cache.blocks import blocks_for
from sampler_service.engine.cache.kv_cache import layer_shapes
from sampler_service.engine.decoder import Decoder
from sampler_service.engine.sequences import Span, TokenSequence
from sampler_service.jobs import BASE_MODEL
from tests.engines_in_process import make_engine, score
from tests.sampler_in_process import SamplerEngine

RANK, ADAPTERS = 32, 8
WARM_UP = 6


class TimedDecoder:
    """Notes how many sequences decoded in the last pass."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.rows = 0

    def run(
        self, spans: Sequence[Span], adapters: Mapping[str, AdapterRow]
    ) -> tuple[Tensor, list[TokenSequence]]:
        self.rows = sum(span.decodes for span in spans)
        return self._decoder.run(spans, adapters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class Workload:
    """An engine with adapters drawn on the device, all of whose sequences decode at once."""

    def __init__(
        self,
        bench: Bench,
        folder: Path,
        most: int,
        *,
        adapters: int = ADAPTERS,
        rank: int = RANK,
        context: int = 1024,
        batch_invariant: bool = False,
    ) -> None:
        self.bench = bench
        self.context = bench.size(context, 40)
        self.rank = rank
        self.steps = bench.size(40, 8)
        self.more = 3 * self.steps + 8
        memory.CACHE_SHARE = 0.7  # nothing else is on the device
        self.sampler = SamplerEngine(
            folder,
            device=str(bench.device),
            dtype="bfloat16",
            max_running_samples=most,
            max_batch_tokens=most + 32 * 512,
            kv_cache_tokens=most * (self.context + self.more + 16),
            batch_invariant=batch_invariant,
        )
        engine = self.sampler.engine
        spec = resolve(LoraRequest(rank=rank, seed=0), self.sampler.model.linear_modules)
        for number in range(adapters):
            row = engine.adapters.bank.add(spec)
            row.part(Part.WEIGHTS).normal_(0.0, 0.01)
            engine.adapters.rows[f"adapter-{number}"] = row
        runner = engine.runner
        self.decoder = runner.decoder or _rehearsed(self.sampler, most)
        self.timed = TimedDecoder(self.decoder)
        runner.decoder = self.timed  # type: ignore[assignment]
        self._sent: list[int] = []  # requests
        self._prompts = 0

    def submit(self, batch: int, adapters: int) -> None:
        rng = np.random.default_rng(batch)
        for number in range(batch):
            sent = self.sampler.submit(
                rng.integers(3, self.sampler.model.vocabulary_size, self.context).tolist(),
                adapter=f"adapter-{number % adapters}" if adapters else BASE_MODEL,
                max_tokens=self.more,  # the first ones decode while the last ones' prompts wait
                seed=number,
            )
            self._sent.append(sent)

    def until_all_decode(self, batch: int) -> None:
        while self.timed.rows < batch:
            self.sampler.step()

    def step_s(self, batch: int, adapters: int) -> float:
        """Seconds of a step in which so many sequences decode."""
        self.timed.rows = 0
        self.submit(batch, adapters)
        times = []
        while self.sampler.engine.busy and len(times) < self.steps:
            self.timed.rows = 0
            started = time.perf_counter()
            self.sampler.step()  # ends with what was drawn on the host
            if self.timed.rows == batch:
                times.append(time.perf_counter() - started)
        self.clear()
        assert len(times) > WARM_UP, "not all decoded at the same time for long enough"
        return statistics.median(times[WARM_UP:])

    def prompt(self, tokens: int) -> None:
        """Computes one that is not kept yet, and draws a token."""
        self._prompts += 1
        prompt = np.random.default_rng(self._prompts).integers(3, 500, tokens).tolist()
        self.sampler.generate(prompt, max_tokens=1)

    def clear(self) -> None:
        while self._sent:
            self.sampler.abort(self._sent.pop())

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Passes are launched kernel by kernel."""
        kept, self.decoder.recordings = self.decoder.recordings, Recordings(None)
        yield
        self.decoder.recordings = kept

    def bound_bytes(self, batch: int, adapters: int) -> float:
        """What a step reads at least: weights, keys and values, adapters."""
        base = self.sampler.engine.base
        weights = sum(s.in_features * s.out_features for s in base.shapes.values())
        ranks = self.rank * sum(s.in_features + s.out_features for s in base.shapes.values())
        token_bytes = sum(shape.token_bytes for shape in layer_shapes(base).values())
        return 2.0 * (weights + min(batch, adapters) * ranks) + batch * self.context * token_bytes


def _rehearsed(sampler: SamplerEngine, most: int) -> Decoder:
    """The decoder that an engine has on a GPU, without one."""
    cache = sampler.engine.runner.cache
    return Decoder(
        sampler.engine.base,
        cache,
        most_rows=most,
        most_blocks=blocks_for(sampler.model.context_length),
        scratch_block=len(cache.layer(0)[0]) - 1,
    )


def decode(bench: Bench, name: str, work: Workload, batches: Sequence[int]) -> None:
    rate = copied_bytes_per_s(bench)
    for batch in batches:
        base_s, own_s = work.step_s(batch, 0), work.step_s(batch, ADAPTERS)
        bound_s = work.bound_bytes(batch, ADAPTERS) / rate
        title = f"{name}, batch {batch}"
        bench.note(f"{title}, step of the base", 1e3 * base_s, "ms", f"{batch / base_s:.0f} tok/s")
        bench.note(f"{title}, 8 adapters", 1e3 * own_s, "ms", f"{batch / own_s:.0f} tok/s")
        bench.note(f"{title}, 8 adapters: of the byte bound", bound_s / own_s, "share", ">= 0.65")
        bench.note(f"{title}, 8 adapters: of the base", base_s / own_s, "share", ">= 0.85")


def sampler(bench: Bench) -> None:
    """0.6B: batches, graphs, the trainer's logprobs, publishing."""
    with random_model(bench, "0.6B") as folder:
        work = Workload(bench, folder, bench.size(256, 4))
        decode(bench, "0.6B", work, (1, 32, 256) if not bench.tiny else (1, 4))
        with work.launching():
            launched_s = work.step_s(1, 0)
        recorded_s = work.step_s(1, 0)
        title = "0.6B, batch 1: launched one by one over recorded"
        bench.note(title, launched_s / recorded_s, "x", ">= 5")
        published(bench, work)
        gap(bench, work, folder)


def sampler_profile(bench: Bench) -> None:
    """0.6B: what takes time in a step, on the device and on the host."""
    with random_model(bench, "0.6B") as folder:
        work = Workload(bench, folder, bench.size(256, 4))
        for batch, adapters in ((1, 0), (1, ADAPTERS), (32, ADAPTERS), (256, ADAPTERS)):
            if batch == 1 or not bench.tiny:
                work.timed.rows = 0
                work.submit(batch, adapters)
                work.until_all_decode(batch)
                title = f"a step of {batch}, {adapters} adapters"
                profiled(bench, title, work.sampler.step)
                profiled(bench, f"{title}, on the host", work.sampler.step, host=True)
                work.clear()


def sampler_mixes(bench: Bench) -> None:
    """0.6B, rank 8: a batch of 128 with no adapter, one, eight, and 64."""
    with random_model(bench, "0.6B") as folder:
        batch = bench.size(128, 4)
        work = Workload(bench, folder, batch, adapters=64, rank=8)
        for adapters in (0, 1, 8, 64):
            step_s = work.step_s(batch, min(adapters, batch))
            speed = f"{batch / step_s:.0f} tok/s"
            bench.note(f"0.6B, batch {batch}, {adapters} adapters", 1e3 * step_s, "ms", speed)


def batch_invariant(bench: Bench) -> None:
    """0.6B: what it costs that no neighbour changes a bit."""
    batches = (1, 32, 128) if not bench.tiny else (1, 4)
    with random_model(bench, "0.6B") as folder:
        found: dict[str, list[float]] = {}
        for asked in (False, True):
            own = asked and not bench.tiny  # on a CPU it is the same
            work = Workload(bench, folder, batches[-1], batch_invariant=own)
            for batch in batches:
                for adapters in (0, ADAPTERS):
                    title = f"0.6B, batch {batch}, {adapters} adapters"
                    found.setdefault(title, []).append(work.step_s(batch, adapters))
            for tokens in (128, 2048) if not bench.tiny else (40,):
                prompt_s = bench.seconds(partial(work.prompt, tokens))
                found.setdefault(f"0.6B, a prompt of {tokens}", []).append(prompt_s)
            del work
            gc.collect()
    for title, (plain_s, own_s) in found.items():
        bench.note(f"{title}, batch-invariant", 1e3 * own_s, "ms", f"{1e3 * plain_s:.2f} without")
        bench.note(f"{title}, batch-invariant over without", own_s / plain_s, "x")


def sampler_short(bench: Bench) -> None:
    """8B at the mean length of 128 tokens in and 1,024 out."""
    with random_model(bench, "8B") as folder:
        work = Workload(bench, folder, bench.size(128, 4), context=640)
        rate = copied_bytes_per_s(bench)
        for batch, published in ((1, 146), (bench.size(128, 4), 10_301)):
            step_s = work.step_s(batch, 0)
            title = f"8B, batch {batch}, 128 in and 1,024 out"
            bench.note(title, batch / step_s, "tokens/s", f"vLLM {published}")
            bound_s = work.bound_bytes(batch, 0) / rate
            bench.note(f"{title}: of the byte bound", bound_s / step_s, "share", ">= 0.65")


def published(bench: Bench, work: Workload) -> None:
    """A new revision, from numbers in host memory to its first token."""
    engine = work.sampler.engine
    row = engine.adapters.rows["adapter-0"]
    vector = row.part(Part.WEIGHTS).cpu()
    pinned = vector if bench.tiny else vector.pin_memory()
    times = []
    for number in range(4):
        started = time.perf_counter()
        fresh = engine.adapters.bank.add(row.spec)
        fresh.come_back({Part.WEIGHTS: pinned.to(bench.device, non_blocking=True)})
        path = f"fresh-{number}"
        engine.adapters.rows[path] = fresh
        work.sampler.generate(list(range(3, 35)), adapter=path, max_tokens=1)
        times.append(time.perf_counter() - started)
    bench.note("new weights to first token, 0.6B", 1e3 * min(times[1:]), "ms", "<= 10")


def gap(bench: Bench, work: Workload, folder: Path) -> None:
    """How far the sampler's logprobs are from the trainer's."""
    prompt = list(range(3, 3 + work.context))
    path, steps = "adapter-0", work.steps
    generated = work.sampler.generate(prompt, adapter=path, max_tokens=steps, prompt_logprobs=True)
    (continuation,) = generated.continuations
    assert generated.prompt_logprobs is not None
    row = work.sampler.row(path)
    engine = make_engine(
        folder, device=str(bench.device), dtype="bfloat16", max_batch_tokens=2048, max_lora_rank=64
    )
    arrays = row.export(Part.WEIGHTS)
    trained = score(engine, [*prompt, *continuation.tokens], row.spec, arrays)
    for part, ours in (("prompt", generated.prompt_logprobs), ("all", None)):
        if ours is None:
            ours = np.concatenate([generated.prompt_logprobs, continuation.model_logprobs])
        difference = ours - trained[: len(ours)]
        title = f"gap of logprobs to the trainer's, {part}"
        bench.note(f"{title}, mean", float(np.abs(difference).mean()), "nats", "<= 1e-2")
        bench.note(f"{title}, most", float(np.abs(difference).max()), "nats")
        kl = float((np.expm1(-difference) + difference).mean())
        bench.note(f"{title}, KL", kl, "nats", "<= 1e-3")


def sampler_8b(bench: Bench) -> None:
    with random_model(bench, "8B") as folder:
        work = Workload(bench, folder, bench.size(128, 4))
        decode(bench, "8B", work, (1, 128) if not bench.tiny else (1, 4))
        work.timed.rows = 0
        work.submit(bench.size(128, 4), ADAPTERS)
        work.until_all_decode(bench.size(128, 4))
        profiled(bench, "8B, a step of 128, 8 adapters", work.sampler.step)

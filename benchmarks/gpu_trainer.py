"""Parts of the checklist that train: the floor of launches, fusion, packed documents, head,
optimizer, and PEFT's loop beside them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_models import CONFIGS, Bench, make_model, random_model
from benchmarks.workloads import ADAM, needed_flops, plans, random_documents
from mint_core.lora import layers
from mint_core.lora.algorithms import LOOP
from mint_core.lora.bank import Part
from mint_core.lora.segments import Segment
from mint_core.lora.spec import LoraRequest
from mint_core.lora.targets import resolve
from mint_core.model.head import Piece
from tests.engines_in_process import make_engine
from trainer_service.engine.digests import digest
from trainer_service.engine.engine import Engine
from trainer_service.jobs import ClearGradient, Document, DropRow, StepRow, StepRows

PEAK = 790e12  # bf16 of the chip, FLOP/s
RANK = 32


class Runs:
    """Runs whose weights are drawn on the device."""

    def __init__(self, engine: Engine, count: int, name: str = "run") -> None:
        self.engine = engine
        self.names = [f"{name}-{i}" for i in range(count)]
        spec = resolve(LoraRequest(rank=RANK, seed=0), engine.base.description.linear_modules)
        for name in self.names:
            with engine._rows.adding(name, engine._bank.add(spec)) as trained:
                trained.row.part(Part.WEIGHTS).normal_(0.0, 0.01)

    def backward(self, *data: Sequence[Document]) -> None:
        """Of all runs together."""
        calls = list(zip(self.names, data, strict=True))
        for plan in plans(self.engine.max_batch_tokens, calls, True):
            for result in self.engine.run(plan):  # type: ignore[attr-defined]
                if result.error is not None:
                    raise result.error

    def step(self, *names: str) -> None:
        self.engine.run(StepRows(tuple(StepRow(name, ADAM) for name in names or self.names)))

    def together(self, *data: Sequence[Document]) -> None:
        self.backward(*data)
        self.step()

    def in_turn(self, *data: Sequence[Document]) -> None:
        for name, own in zip(self.names, data, strict=True):
            for plan in plans(self.engine.max_batch_tokens, [(name, own)], True):
                self.engine.run(plan)
            self.step(name)

    def drop(self) -> None:
        for name in self.names:
            self.engine.run(DropRow(name))


@contextmanager
def engine_of(bench: Bench, name: str) -> Iterator[Engine]:
    with random_model(bench, name) as folder:
        engine = make_engine(
            folder,
            device=str(bench.device),
            dtype="bfloat16",
            max_lora_rank=64,
            max_batch_tokens=bench.size(0, 256),
        )
        print(f"{name}: {engine.lengths}, passes of {engine.max_batch_tokens} tokens", flush=True)
        yield engine


def documents(bench: Bench, lengths: Sequence[int], seed: int = 0) -> tuple[Document, ...]:
    vocabulary = CONFIGS["tiny" if bench.tiny else "0.6B"].vocab_size
    shorter = [max(4, n // bench.size(1, 16)) for n in lengths]
    return random_documents(shorter, vocabulary_size=vocabulary, seed=seed)


def mixed(bench: Bench, count: int) -> tuple[Document, ...]:
    """Of 100 to 1,024 tokens."""
    return documents(bench, np.random.default_rng(0).integers(100, 1025, count).tolist())


def trainer(bench: Bench) -> None:
    """The floor of a pass, and several runs in one pass against one after the other."""
    with engine_of(bench, "0.6B") as engine:
        one = Runs(engine, 1)
        short = documents(bench, [64])
        seconds = bench.seconds(lambda: one.backward(short))
        bench.note("forward_backward of 64 tokens, 0.6B", 1e3 * seconds, "ms", "30 expected")
        count_launches(bench, "forward_backward of 64 tokens", lambda: one.backward(short))
        launch_costs(bench)
        profiled(bench, "64 tokens, on the host", lambda: one.backward(short), host=True)
        seconds = bench.seconds(lambda: one.step())
        bench.note("optim_step, rank 32, 0.6B", 1e3 * seconds, "ms")
        one.drop()
        runs = Runs(engine, 8)
        for tokens, docs, target in ((64, 1, ">= 3"), (128, 4, ">= 3"), (1024, 8, ">= 0.97")):
            data = [documents(bench, [tokens] * docs, seed=i) for i in range(8)]
            rounds = 3 if tokens > 500 else 5
            fused = bench.seconds(lambda d=data: runs.together(*d), rounds, 1)
            alone = bench.seconds(lambda d=data: runs.in_turn(*d), rounds, 1)
            title = f"8 runs x {docs} x {tokens} tokens, step together"
            bench.note(title, 1e3 * fused, "ms")
            bench.note(f"{title}: one by one over it", alone / fused, "x", target)
        data = [documents(bench, [128] * 4, seed=i) for i in range(8)]
        count_launches(bench, "8 runs x 4 x 128 tokens, backward", lambda: runs.backward(*data))
        fused_error(bench, engine, runs, data)


def trainer_rate(bench: Bench) -> None:
    """Tokens per second, and what takes the time of a long pass."""
    with engine_of(bench, "0.6B") as engine:
        train_rate(bench, engine, "0.6B", mixed(bench, 64), "64 documents of 100 to 1,024 tokens")
        runs = Runs(engine, 8)
        profiled(bench, "a pass of 16k tokens", lambda: runs.backward(*_parted(bench)))


def _parted(bench: Bench) -> list[tuple[Document, ...]]:
    return [documents(bench, [512] * 4, seed=i) for i in range(8)]


def fused_error(
    bench: Bench, engine: Engine, runs: Runs, data: Sequence[Sequence[Document]]
) -> None:
    """How far a run's gradient beside seven others is from the same alone."""
    row = engine._rows[runs.names[3]].row

    def gradient(*calls: tuple[str, Sequence[Document]]) -> torch.Tensor:
        for name, _ in calls:
            engine.run(ClearGradient(name))
        for plan in plans(engine.max_batch_tokens, list(calls), True):
            engine.run(plan)
        return row.part(Part.GRADIENT).clone()

    def differ(ours: torch.Tensor, expected: torch.Tensor) -> float:
        return ((ours - expected).norm() / expected.norm()).item()

    calls = list(zip(runs.names, data, strict=True))
    alone, fused = gradient(calls[3]), gradient(*calls)
    bench.note("gradient beside 7 runs against alone", differ(fused, alone), "relative", "<= 1e-2")
    bench.note("the same, alone twice", differ(gradient(calls[3]), alone), "relative")
    kept = layers.choose
    layers.choose = lambda _: LOOP  # type: ignore[assignment]
    bench.note("the same, both by the loop", differ(gradient(*calls), alone), "relative")
    layers.choose = kept


def train_rate(
    bench: Bench, engine: Engine, name: str, data: Sequence[Document], title: str
) -> None:
    run = Runs(engine, 1, "rate")
    peak = bench.peak_bytes(lambda: run.backward(data))
    seconds = bench.seconds(lambda: run.together(data), 3, 1)
    tokens = sum(len(d.tokens) for d in data)
    flops = needed_flops(engine.base, data, RANK)
    bench.note(f"{name}, {title}", tokens / seconds, "tokens/s")
    bench.note(f"{name}, {title}: MFU", flops / seconds / PEAK, "share", ">= 0.3; 8B 0.5")
    bench.note(f"{name}, {title}: memory of a pass", peak / 2**30, "GiB")
    run.drop()


def head(bench: Bench) -> None:
    """Head and loss against full logits."""
    with engine_of(bench, "0.6B") as engine:
        base = engine.base
        tokens = bench.size(8192, 64)
        width = base.shapes["lm_head"].in_features
        hidden = torch.randn(tokens, width, device=bench.device, dtype=torch.bfloat16)
        targets = torch.zeros(tokens, dtype=torch.long, device=bench.device)
        piece = Piece(Segment(0, tokens), torch.arange(tokens, device=bench.device))
        weight = base.model.get_submodule("lm_head").weight

        def chunked(share: float) -> None:
            rows = piece.rows[: int(share * tokens)]
            own = Piece(piece.segment, rows)
            base.head.gradient(
                hidden, [own], [targets[rows]], lambda _, place, z: torch.full_like(z, -1.0)
            )

        def full() -> None:
            leaf = hidden.clone().requires_grad_()
            logits = functional.linear(leaf, weight)  # type: ignore[arg-type]
            functional.cross_entropy(logits.float(), targets, reduction="sum").backward()

        naive_s, naive = bench.seconds(full, 3), bench.peak_bytes(full)
        for share, target in ((1.0, "<= 1.1"), (0.3, "<= 0.5")):
            seconds = bench.seconds(lambda s=share: chunked(s), 3)
            title = f"head and loss of {tokens} tokens, {share:.0%} weighted"
            bench.note(f"{title}: over full logits' time", seconds / naive_s, "share", target)
        peak = bench.peak_bytes(lambda: chunked(1.0))
        bench.note(
            "head and loss: over full logits' memory", peak / max(naive, 1), "share", "<= 0.1"
        )


def peft(bench: Bench) -> None:
    """PEFT and transformers, documents padded to the longest of 8, against our engine."""
    data = mixed(bench, 64)
    with engine_of(bench, "0.6B") as engine:
        run = Runs(engine, 1)
        ours = bench.seconds(lambda: run.together(data), 3, 1)
        ours_step = bench.seconds(lambda: run.step())
        digest_s = bench.seconds(lambda: digest(engine._rows["run-0"].row.part(Part.WEIGHTS)))
        bench.note("digest of the weights, rank 32, 0.6B", 1e3 * digest_s, "ms")
        modules = engine.base.description.linear_modules
        run.drop()
    loop = PaddedLoop(bench, modules)
    theirs = bench.seconds(lambda: loop.train(data), 3, 1)
    bench.note("0.6B, 64 documents of 100 to 1,024 tokens, ours", ours, "s")
    bench.note("the same by PEFT's padded loop", theirs, "s")
    bench.note("PEFT's loop over ours", theirs / ours, "x", ">= 2")
    their_step = bench.seconds(loop.step)
    bench.note("our optim_step over torch.optim's, foreach", ours_step / their_step, "x", "<= 0.05")


class PaddedLoop:
    """What a user would write: one adapter in bfloat16, 8 documents at a time, full logits."""

    def __init__(self, bench: Bench, modules: Sequence[str]) -> None:
        from peft import LoraConfig, get_peft_model

        self._device = bench.device
        model = make_model(CONFIGS["tiny" if bench.tiny else "0.6B"], bench.device, "sdpa")
        names = sorted({name.rpartition(".")[2] for name in modules} - {"lm_head"})
        config = LoraConfig(r=RANK, lora_alpha=32, target_modules=names, lora_dropout=0.0)
        self._model: nn.Module = get_peft_model(model, config)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4, foreach=True)

    def train(self, data: Sequence[Document]) -> None:
        for start in range(0, len(data), 8):
            self._backward(data[start : start + 8])
        self.step()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def _backward(self, data: Sequence[Document]) -> None:
        from benchmarks.peft_loop import IGNORED, padded

        tokens, labels, mask = (part.to(self._device) for part in padded(data))
        logits = self._model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        loss = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss.backward()


def trainer_8b(bench: Bench) -> None:
    with engine_of(bench, "8B") as engine:
        train_rate(bench, engine, "8B", mixed(bench, 16), "16 documents of 100 to 1,024 tokens")
        one = Runs(engine, 1)
        short = documents(bench, [64])
        seconds = bench.seconds(lambda: one.backward(short), 3)
        bench.note("forward_backward of 64 tokens, 8B", 1e3 * seconds, "ms")
        seconds = bench.seconds(lambda: one.step())
        bench.note("optim_step, rank 32, 8B", 1e3 * seconds, "ms", "<= 2")
        digest_s = bench.seconds(lambda: digest(engine._rows["run-0"].row.part(Part.WEIGHTS)))
        bench.note("of which the digest of the weights", 1e3 * digest_s, "ms")
        profiled(bench, "8B, a pass", lambda: one.backward(documents(bench, [512] * 8)))


def _profile(bench: Bench, call: Callable[[], object], *, host: bool = False) -> profile:
    call()
    bench.wait()
    kinds = [ProfilerActivity.CPU if bench.tiny or host else ProfilerActivity.CUDA]
    with profile(activities=kinds) as seen:
        call()
        bench.wait()
    return seen


def launch_costs(bench: Bench) -> None:
    """What the host takes for a launch, when it does not wait for the device."""
    numbers = torch.zeros(64, device=bench.device)
    trained = torch.zeros(64, device=bench.device, requires_grad=True)
    count = bench.size(1000, 10)

    def forward_backward() -> None:
        y = trained
        for _ in range(count):
            y = y + 1
        y.sum().backward()

    def add() -> None:
        for _ in range(count):
            numbers.add_(1.0)

    bench.note("a launch", 1e6 * bench.seconds(add) / count, "us")
    both = bench.seconds(forward_backward) / count
    bench.note("an addition and its backward under autograd", 1e6 * both, "us")


def count_launches(bench: Bench, title: str, call: Callable[[], object]) -> None:
    averages = _profile(bench, call).key_averages()
    launches = sum(e.count for e in averages if e.self_device_time_total > 0)
    busy = sum(e.self_device_time_total for e in averages)
    bench.note(f"{title}: kernels and copies", launches, "", f"{busy / 1e3:.2f} ms on the device")


def profiled(bench: Bench, title: str, call: Callable[[], object], *, host: bool = False) -> None:
    """The kernels that take longest; or the operators that take the host longest."""
    averages = _profile(bench, call, host=host).key_averages()
    kind = "self_cpu_time_total" if bench.tiny or host else "self_device_time_total"
    print(f"-- {title}")
    longest = sorted(averages, key=lambda e: -getattr(e, kind))[:16]
    total = sum(getattr(e, kind) for e in averages)
    for event in longest:
        spent, name = getattr(event, kind), _short(event.key)
        print(f"{spent / 1e3:9.2f} ms {spent / max(total, 1):5.0%} {event.count:6} x {name}")
    print(f"{total / 1e3:9.2f} ms in all", flush=True)


def _short(kernel: str) -> str:
    """A kernel's name; of torch's templates what they were made for."""
    made_for = [
        word
        for word in re.findall(r"\w+", kernel)
        if ("Functor" in word or word.endswith(("_cuda", "_kernel_cuda", "_impl")))
        and not word.startswith("gpu_kernel")
    ]
    return " ".join([kernel[:60], *dict.fromkeys(made_for)])[:140]

"""Parts of the checklist for what has never run on a GPU: tests of kernels and of recorded passes,
small passes recorded and launched, and each kernel against the bytes that it must move.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu_models import CONFIGS, Bench, copied_bytes_per_s
from benchmarks.gpu_trainer import Runs, count_launches, documents, engine_of, profiled
from mint_core.lora.algorithms import KERNELS, Adapted, Gradients
from mint_core.lora.bank import AdapterBank, Part
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.segments import Segment
from mint_core.lora.spec import AdapterSpec
from tests.recorders import PlainRecorder
from trainer_service.engine.engine import Engine
from trainer_service.engine.recorded.passes import RecordedPasses

BF16 = torch.bfloat16
_KERNELS = ("segment_kernels", "fused_layers", "head_kernels", "column_kernels", "softmax_kernels")
_OLDER = ("float8", "weight_kernels", "paged_attention")
# Some of theirs are for GPUs; the last one's are not skipped without.
_ELSEWHERE = ("algorithms", "attention", "base_files")


def kernel_tests(bench: Bench) -> None:
    """Each kernel against its oracle."""
    names = (_KERNELS + _OLDER)[: 1 if bench.tiny else None]
    _tested(bench, [f"tests/parity/test_{name}.py" for name in names])


def pass_tests(bench: Bench) -> None:
    """Recorded passes of both engines, and the rest of the engines' tests on a GPU."""
    elsewhere = _ELSEWHERE[: -1 if bench.tiny else None]
    names = ("gpu", "sampler_gpu", "delta_rule_fla")
    files = [f"tests/parity/test_{name}.py" for name in names]
    files += [f"tests/unit/mint_core/test_{name}.py" for name in elsewhere]
    _tested(bench, files, "gpu")


def _tested(bench: Bench, files: Sequence[str], kind: str = "gpu or not gpu") -> None:
    # A line for each test, so that what was found is there when time is up; and tests end before
    # who has started them is ended.
    options = ["-v", "--no-header", "-p", "no:cacheprovider", "-m", kind]
    # A lent machine has other releases, which warn of other things, and not all of our plugins.
    options += ["-W", "default", *([] if bench.tiny else ["-n", "8"])]  # kernels compile meanwhile
    command = ["timeout", "55", sys.executable, "-m", "pytest", *options, *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            print(line, end="", flush=True)
    bench.note(f"tests in {len(files)} files: status", tests.returncode, "", "0")


@contextmanager
def _launched(engine: Engine) -> Iterator[None]:
    """Passes are launched kernel by kernel."""
    kept, engine.recorded = engine.recorded, None
    yield
    engine.recorded = kept


def recorded(bench: Bench) -> None:
    """Small passes of 0.6B, recorded against launched: gradients, time, launches, memory."""
    with engine_of(bench, "0.6B") as engine:
        if bench.tiny:
            engine.recorded = RecordedPasses(engine.base, 4096, PlainRecorder())
        for count, docs, tokens in ((1, 1, 64), (8, 1, 64), (8, 4, 128)):
            runs = Runs(engine, count, f"{count}x{docs}x{tokens}")
            data = [documents(bench, [tokens] * docs, seed=i) for i in range(count)]
            title = f"0.6B, {count} x {docs} x {tokens} tokens"
            row = engine._rows[runs.names[-1]].row
            gradients = []
            for way in (_launched(engine), _unchanged()):
                with way:
                    for _ in range(3):  # as it is, recorded, replayed
                        row.part(Part.GRADIENT).zero_()
                        runs.backward(*data)
                        gradients.append(row.part(Part.GRADIENT).clone())
            launched, *_, replayed = gradients
            difference = ((replayed - launched).norm() / launched.norm()).item()
            bench.note(f"{title}: gradient against launched", difference, "relative", "<= 1e-2")

            def one(runs: Runs = runs, data: Sequence[object] = data) -> None:
                runs.backward(*data)  # type: ignore[arg-type]

            replay_s = bench.seconds(one)
            count_launches(bench, f"{title}, recorded", one)
            with _launched(engine):
                launch_s = bench.seconds(one)
                count_launches(bench, f"{title}, launched", one)
            bench.note(f"{title}, recorded", 1e3 * replay_s, "ms", "<= 15")
            bench.note(f"{title}, launched over recorded", launch_s / replay_s, "x")
            profiled(bench, title, one)
            runs.drop()
        print(dict(engine.counts().passes))
        if not bench.tiny:
            bench.note("memory that torch holds", torch.cuda.memory_reserved() / 2**30, "GiB")


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def kernel_times(bench: Bench) -> None:
    """Kernels of 0.6B's widths at few and at many rows, against a copy of their bytes."""
    rate = copied_bytes_per_s(bench)
    for tokens in (1, 64, 1024, 4096) if not bench.tiny else (1, 8):
        for name, moved, call in _timed(bench, tokens):
            seconds = bench.seconds(call, 10)
            title = f"{tokens} rows, {name}"
            bench.note(title, 1e6 * seconds, "us", f"{moved / rate / seconds:.2f} of a copy's rate")


def _timed(bench: Bench, tokens: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Names, bytes and calls."""
    from mint_core.model.fused.head_kernels import Kept, turned
    from mint_core.model.fused.mlp_kernels import gated, gated_back
    from mint_core.model.fused.norm_kernels import normed_sum, normed_sum_back

    config = CONFIGS["tiny" if bench.tiny else "0.6B"]
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    width, wide, size = config.hidden_size, config.intermediate_size, config.head_dim

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=bench.device, dtype=BF16)

    x, added, weight = drawn(tokens, width), drawn(tokens, width), drawn(width)
    yield "sum and norm", 4 * x.nbytes, lambda: normed_sum(x, added, weight, 1e-6)
    yield "back", 4 * x.nbytes, lambda: normed_sum_back(x, weight, 1e-6, added, added)
    both, product = drawn(tokens, 2 * wide), drawn(tokens, wide)
    yield "gate", 3 * product.nbytes, lambda: gated(both, 0)
    yield "back", 5 * product.nbytes, lambda: gated_back(both, product, 0)
    heads, turns = (
        drawn(tokens, queries + 2 * keys, size),
        (drawn(tokens, 1, size), drawn(tokens, 1, size)),
    )
    slots = torch.arange(tokens, device=bench.device)
    kept = Kept(drawn(tokens, keys, size), drawn(tokens, keys, size), slots)
    norm = drawn(queries + keys, size), 1e-6
    yield "heads, kept", 2 * heads.nbytes, lambda: turned(heads, *turns, norm, kept)
    if tokens == 1:
        return
    group = ModuleGroup(("q", "k", "v"), width, (2 * width, width, width))
    spec = AdapterSpec(rank=32, alpha=32.0, use_rslora=False, seed=0, modules=group.modules)
    bank = AdapterBank((group,), bench.device)
    rows = [bank.add(spec) for _ in range(8)]
    own = tokens // 8
    segments = tuple(
        Segment(own * i, own * (i + 1), row, accumulate=True) for i, row in enumerate(rows)
    )
    adapted = Adapted(segments, bench.device, BF16)
    y, dy = (drawn(tokens, group.width).split(group.out_features, 1) for _ in range(2))
    moved = 8 * bank.rank_class(32).row_size * 2 + 3 * x.nbytes + 2 * tokens * group.width * 2
    yield "8 adapters", moved, lambda: KERNELS.forward(x, y, adapted, group)
    saved = KERNELS.forward(x, y, adapted, group)
    gradients = Gradients(x, dy, added)
    yield "back", 5 * moved, lambda: KERNELS.backward(gradients, saved, adapted, group)

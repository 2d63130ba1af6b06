"""What stands between the matrix products of a layer, in kernels, against torch; and how many
launches a small pass takes. Without a GPU the kernels run in Triton's interpreter.
"""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mint_core.lora.bank import Part
from mint_core.lora.segments import Segment
from mint_core.lora.spec import LoraRequest
from mint_core.model.head import Piece
from mint_core.model.shortcuts import RmsNorm, rotated, turn
from tests.engines_in_process import EngineRun, make_documents, make_engine, run_plan
from tests.interpreted_kernels import DEVICE, in_kernels
from tests.launches import OneKernelAttention, counted
from tests.models import tiny_qwen3
from trainer_service.jobs import CrossEntropy

from mint_core.model.fused.functions import Gated, Heads, NormedSum  # isort: skip

TOKENS, EPS = 7, 1e-5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def same(ours: Sequence[Tensor], expected: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs and gradients agree."""
    upstream = [drawn(*each.shape, seed=9) for each in expected]
    ours_back = torch.autograd.grad(ours, inputs, upstream, retain_graph=True)
    expected_back = torch.autograd.grad(expected, inputs, upstream)
    pairs = zip((*ours, *ours_back), (*expected, *expected_back), strict=True)
    for own, theirs in pairs:
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("width", [16, 70])
def test_a_sum_and_its_norm(width: int, adds: bool) -> None:
    x, added = (drawn(TOKENS, width, seed=i).requires_grad_() for i in (1, 2))
    weight = drawn(width)
    total = x + added if adds else x * 1.0
    expected = total, functional.rms_norm(total, (width,), weight, EPS)
    ours = NormedSum.apply(x, added if adds else None, weight, EPS)
    same(ours, expected, [x, added] if adds else [x])


def test_a_sum_that_nothing_else_asks_for() -> None:
    x, weight = drawn(TOKENS, 16).requires_grad_(), drawn(16)
    _, normed = NormedSum.apply(x, None, weight, EPS)
    same([normed], [functional.rms_norm(x, (16,), weight, EPS)], [x])


@pytest.mark.parametrize(("kind", "name"), [(0, "none"), (1, "tanh")])
def test_a_gated_product(kind: int, name: str) -> None:
    wide = drawn(TOKENS, 2 * 1100).requires_grad_()
    gate, up = wide.chunk(2, 1)
    activated = functional.gelu(gate, approximate=name) if kind else functional.silu(gate)
    same([Gated.apply(wide, kind)], [activated * up], [wide])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size", [16, 24])
def test_heads(size: int, normed: bool) -> None:
    counts = [6, 3, 3]
    heads = drawn(TOKENS, sum(counts), size).requires_grad_()
    turns = turn(*(drawn(1, TOKENS, size, seed=i) for i in (1, 2)))
    weight = drawn(9, size)
    both = rotated(heads[:, :9], turns, RmsNorm(weight, EPS) if normed else None)
    queries, keys = both.transpose(0, 1).split(counts[:2])
    expected = queries, keys, heads[:, 9:].transpose(0, 1)
    ours = Heads.apply(heads, *turns, (weight, EPS) if normed else None, counts)
    same(ours, expected, [heads])


def gradients(
    folder: Path, around: AbstractContextManager[None] | None = None
) -> list[dict[str, np.ndarray]]:
    """Of three runs in one pass, of different ranks, one of the attention alone."""
    engine = make_engine(folder)
    requests = (
        LoraRequest(rank=8, seed=1),
        LoraRequest(rank=3, seed=2, train_mlp=False, train_unembed=False),
        LoraRequest(rank=16, seed=3),
    )
    runs = [EngineRun(engine, f"r{i}", asked, random=i + 1) for i, asked in enumerate(requests)]
    tiles = [
        run.tile(make_documents(i, (4, 5 + i)[i // 2 :]), CrossEntropy())
        for i, run in enumerate(runs)
    ]
    with around or nullcontext():
        run_plan(engine, *tiles)
    return [run.gradient() for run in runs]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has its own test, test_gpu.py")
def test_a_pass_in_kernels_gives_the_gradients_of_the_cpus(
    qwen3_folder: Path,
) -> None:
    expected = gradients(qwen3_folder)
    ours = gradients(qwen3_folder, in_kernels())
    for own, theirs in zip(ours, expected, strict=True):
        for name, matrix in theirs.items():
            assert np.abs(own[name] - matrix).max() <= 2e-5 * max(1e-3, np.abs(matrix).max())


LAYERS, TENANTS, LENGTH = 28, 8, 4  # of Qwen3 0.6B; launches do not depend on lengths
MOST_LAUNCHES = 1300


@pytest.mark.skipif(DEVICE.type == "cuda", reason="they are counted in the interpreter")
def test_a_small_pass_of_many_tenants_takes_few_launches(tmp_path: Path) -> None:
    few, more = (sum(launches_of(tmp_path / str(n), n).values()) for n in (1, 2))
    assert few + (LAYERS - 1) * (more - few) <= MOST_LAUNCHES


def launches_of(folder: Path, layers: int) -> dict[str, int]:
    """Of a pass, forward and backward, of all tenants together."""
    engine = make_engine(tiny_qwen3(folder, layers=layers))
    requests = [LoraRequest(rank=8 * (i % 2 + 1), seed=i) for i in range(TENANTS)]
    runs = [EngineRun(engine, f"r{i}", asked, random=i) for i, asked in enumerate(requests)]
    base, bounds = engine.base, [LENGTH * i for i in range(len(runs) + 1)]
    rows = [engine._rows[run.name].row for run in runs]
    for row in rows:
        row.part(Part.GRADIENT)
    segments = tuple(
        Segment(*span, row, accumulate=True)
        for span, row in zip(itertools.pairwise(bounds), rows, strict=True)
    )
    tokens = torch.arange(bounds[-1]) % 50 + 3
    positions = torch.arange(LENGTH).repeat(len(runs))
    pieces = [Piece(s, torch.arange(s.start, s.stop)) for s in segments]
    targets = [tokens[s.rows] for s in segments]
    with counted() as launches:
        attention = OneKernelAttention(bounds, launches)
        hidden = base.hidden(tokens, positions, segments, attention)
        gradient = base.head.gradient(
            hidden.detach(), pieces, targets, lambda i, place, logprobs: torch.ones_like(logprobs)
        )
        hidden.backward(gradient)
    return dict(launches.counts)

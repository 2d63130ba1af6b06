"""Bases loaded for inference: rows that are the same bits whatever is computed beside them."""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.lanes import Lanes
from mint_core.lora.packed import PackedLinear, available
from mint_core.lora.segments import MIN_ROWS, Segment
from mint_core.lora.spec import LoraRequest
from mint_core.lora.targets import resolve
from mint_core.model import inference
from mint_core.model.attention import PackedAttention
from mint_core.model.head import Piece
from mint_core.model.loading import LoadedBase
from tests.models import load_base, tiny_gemma3, tiny_llama, tiny_phi3, tiny_qwen2, tiny_qwen3

REQUESTS = [
    LoraRequest(rank=8, seed=1),
    LoraRequest(rank=5, seed=2, alpha=7.0),
    LoraRequest(rank=8, seed=3, train_attn=False),
    LoraRequest(rank=16, seed=4),
    LoraRequest(rank=8, seed=5, target_modules=("q_proj", "v_proj", "lm_head")),
]


@pytest.fixture(scope="module")
def base(qwen3_folder: Path) -> LoadedBase:
    return load_base(str(qwen3_folder), inference=True)


def make_rows(base: LoadedBase, count: int = len(REQUESTS)) -> list[AdapterRow]:
    bank = base.new_bank()
    rows = []
    for number, request in enumerate(REQUESTS[:count]):
        row = bank.add(resolve(request, base.description.linear_modules))
        generator = torch.Generator().manual_seed(number)
        for module in row.modules:
            a, b = row.bank.matrices(row.part(Part.WEIGHTS), module)
            for matrix in (a[: row.spec.rank], b[:, : row.spec.rank]):
                matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def rows(base: LoadedBase) -> list[AdapterRow]:
    return make_rows(base)


@torch.no_grad()
def run(
    base: LoadedBase, tokens: Sequence[int], owners: Sequence[AdapterRow | None], *, rowwise: bool
) -> Tensor:  # [tokens, V]
    """Logits after sequences of one token, owners side by side."""
    segments: list[Segment] = []
    for row, own in itertools.groupby(owners):
        start = segments[-1].stop if segments else 0
        segments.append(Segment(start, start + len(list(own)), row, rowwise=rowwise))
    each_alone = PackedAttention(list(range(len(tokens) + 1)))
    positions = torch.tensor([token % 7 for token in tokens])
    hidden = base.hidden(torch.tensor(tokens), positions, tuple(segments), each_alone)
    places = torch.arange(len(tokens))
    return base.head.logits(hidden, [Piece(s, places[s.rows]) for s in segments])


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen2, tiny_llama, tiny_gemma3, tiny_phi3])
def test_packed_weights_compute_what_the_others_do(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = str(make(tmp_path))
    packed, plain = load_base(folder, inference=True), load_base(folder)
    assert packed.min_rows == 1
    assert plain.min_rows == MIN_ROWS
    tokens = list(range(40, 49))
    owners = [[None, *make_rows(base, 2)][i // 4] for base in (packed, plain) for i in range(9)]
    ours = run(packed, tokens, owners[:9], rowwise=True)
    expected = run(plain, tokens, owners[9:], rowwise=False)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@given(counts=st.lists(st.integers(0, 4), min_size=6, max_size=6), order=st.permutations(range(6)))
def test_a_row_is_the_same_bits_whoever_is_beside_it(
    counts: list[int], order: list[int], base: LoadedBase, rows: list[AdapterRow]
) -> None:
    kinds = [None, *rows]
    owners = [kinds[i] for i in order for _ in range(counts[i])]
    tokens = [100 + 3 * i for i in range(len(owners))]
    if not tokens:
        return
    together = run(base, tokens, owners, rowwise=True)
    for i, owner in enumerate(owners):
        assert torch.equal(run(base, tokens[i : i + 1], [owner], rowwise=True)[0], together[i])


def test_adapters_that_do_not_fit_side_by_side_give_the_same_bits(
    base: LoadedBase, rows: list[AdapterRow]
) -> None:
    """Also those that take others' places from pass to pass."""
    passes = [rows[:2], rows[1:3], rows[2::-1], [rows[0], rows[2], rows[4]], rows[::2]]
    kept = base.context.lanes
    results = []
    for most_bytes in (0, 2 * rows[0].bank.part_bytes, 2**28):
        base.context.lanes = Lanes(most_bytes)
        results.append([run(base, list(range(9, 9 + len(p))), p, rowwise=True) for p in passes])
    base.context.lanes = kept
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_weights_loaded_anew_are_applied(base: LoadedBase) -> None:
    rows = make_rows(base)[::2]
    tokens = [5, 6, 7]
    run(base, tokens, rows, rowwise=True)
    arrays = rows[0].export(Part.WEIGHTS)
    rows[0].load(Part.WEIGHTS, {name: 2.0 * array for name, array in arrays.items()})
    together = run(base, tokens, rows, rowwise=True)
    assert torch.equal(run(base, tokens[:1], rows[:1], rowwise=True)[0], together[0])


def test_what_a_cpu_costs_is_said_with_what_there_is_to_do(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inference, "_rows_are_alike", lambda base: False)
    with caplog.at_level(logging.INFO, logger=inference.__name__):
        assert load_base(str(qwen3_folder), inference=True).min_rows == MIN_ROWS
    said = caplog.messages[-1]
    assert f"filled up to {MIN_ROWS} rows: fewer sequences take as long as so many" in said
    assert "nothing need be done" in said


def test_the_unpacked_weights_are_given_back(base: LoadedBase) -> None:
    for group in base.groups:
        for module in group.modules:
            assert base.model.get_submodule(module).weight.numel() == 0  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("shape", [(16, 8), (64, 192), (100, 30)])
def test_a_packed_layer_computes_rows_alike(shape: tuple[int, int]) -> None:
    weight, bias, x = (
        torch.randn(shape[1], shape[0]),
        torch.randn(shape[1]),
        torch.randn(9, shape[0]),
    )
    packed = PackedLinear(weight, bias)
    assert packed.computes_rows_alike()
    torch.testing.assert_close(packed(x), functional.linear(x, weight, bias))


def test_other_types_and_devices_are_not_packed(qwen3_folder: Path) -> None:
    assert not available(torch.device("cuda"), torch.float32)
    base = load_base(str(qwen3_folder), dtype="bfloat16", inference=True)
    assert base.min_rows == MIN_ROWS


def test_a_base_for_training_takes_no_rowwise_segments(qwen3_folder: Path) -> None:
    with pytest.raises(AssertionError, match="not packed"):
        run(load_base(str(qwen3_folder)), [1], [None], rowwise=True)

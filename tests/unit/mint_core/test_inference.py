"""Bases loaded for inference: rows that are the same bits whatever is computed beside them."""

import itertools
import logging
import os
import sys
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
from mint_core.lora.products.packed import SIZES, PackedLinear, Packing, Sizes, available
from mint_core.lora.segments import MIN_ROWS, Segment
from mint_core.lora.spec import LoraRequest
from mint_core.lora.targets import resolve
from mint_core.model import inference
from mint_core.model.attention import PackedAttention
from mint_core.model.head import Piece
from mint_core.model.loading import LoadedBase
from tests.models import load_base, tiny_gemma3, tiny_llama, tiny_phi3, tiny_qwen2, tiny_qwen3
from tests.warm import started

REQUESTS = [
    LoraRequest(rank=8, seed=1),
    LoraRequest(rank=5, seed=2, alpha=7.0),
    LoraRequest(rank=8, seed=3, train_attn=False),
    LoraRequest(rank=16, seed=4),
    LoraRequest(rank=8, seed=5, target_modules=("q_proj", "v_proj", "lm_head")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose inner size is such that AVX-512 adds up one row otherwise than two."""
    return tiny_qwen3(tmp_path_factory.mktemp("wide"), inner=1536)


@pytest.fixture(scope="module")
def base(folder: Path) -> LoadedBase:
    return load_base(folder, inference=True)


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
        base.context.lanes = Lanes(torch.float32, most_bytes)
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


def alone_and_together(folder: Path, *, dtype: str = "float32") -> int:
    """How many rows a segment needs, and whether each is the same bits whoever is beside it."""
    base = load_base(folder, inference=True, dtype=dtype)
    owners = [None, *make_rows(base), *make_rows(base)]
    tokens = list(range(60, 60 + len(owners)))
    together = run(base, tokens, owners, rowwise=True)
    for i, owner in enumerate(owners):
        assert torch.equal(run(base, tokens[i : i + 1], [owner], rowwise=True)[0], together[i])
    return base.min_rows


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_rows_are_alike_with_other_instructions(instructions: str, folder: Path) -> None:
    command = [sys.executable, "-m", __name__, str(folder), instructions]
    with started(command) as process:
        assert process.wait() == 0


def test_bfloat16_is_packed_where_there_is_a_onednn_for_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if available(torch.device("cpu"), torch.bfloat16):
        assert alone_and_together(folder, dtype="bfloat16") == 1
        return
    with caplog.at_level(logging.INFO, logger=inference.__name__):
        assert load_base(folder, inference=True, dtype="bfloat16").min_rows == MIN_ROWS
    assert "weights are not packed: oneDNN has no bfloat16 for this CPU" in caplog.messages[-1]


def test_bits_can_be_traded_for_speed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=inference.__name__):
        base = load_base(folder, inference=True, trade_bits_for_speed=True)
    assert base.min_rows == 1
    assert base.description.bits_traded_for_speed
    assert not base.description.bitwise_reproducible
    assert caplog.messages[-1] == "weights packed: all, rows computed as they come"
    plain = load_base(folder)
    ours, expected = (
        run(b, [5, 6, 7, 8], [make_rows(b, 1)[0]] * 4, rowwise=b is base) for b in (base, plain)
    )
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not load_base(folder, trade_bits_for_speed=True).description.bitwise_reproducible


def test_what_is_packed_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=inference.__name__):
        load_base(folder, inference=True)
    said = next(each for each in caplog.messages if each.startswith("weights packed: "))
    assert "64x1536 " in said  # down
    assert "3072x64 as it is" in said  # gate and up


def test_the_unpacked_weights_are_given_back(base: LoadedBase) -> None:
    for group in base.groups:
        for module in group.modules:
            assert base.model.get_submodule(module).weight.numel() == 0  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(("inner", "outer"), [(16, 8), (64, 192), (100, 30), (2304, 48)])
def test_a_packed_layer_computes_rows_alike(inner: int, outer: int) -> None:
    weight, bias, x = torch.randn(outer, inner), torch.randn(outer), torch.randn(150, inner)
    (packed,) = Packing(exact=True).layers([weight], bias)
    whole = packed(x)
    torch.testing.assert_close(whole, functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    for rows in (*range(1, 140), 149):
        assert torch.equal(packed(x[-rows:]), whole[-rows:])


class Rounding(PackedLinear):
    """As of a library that rounds some numbers of rows otherwise, or the rows at some places."""

    def __init__(self, rounded: Callable[[int], Tensor]) -> None:
        super().__init__(torch.eye(8), None)
        self._rounded = rounded

    def product(self, x: Tensor) -> Tensor:
        return super().product(x) + self._rounded(len(x))


@pytest.mark.parametrize(
    ("rounded", "left"),
    [
        (lambda rows: torch.tensor(float(rows < 4)), SIZES[3:]),
        (lambda rows: torch.tensor(float(rows > 32)), SIZES[:16]),
        (lambda rows: torch.arange(rows)[:, None] // 10, SIZES[:9]),
        (lambda rows: torch.arange(rows)[:, None], (1,)),
        (lambda rows: torch.tensor(float(rows)), (8,)),
    ],
)
def test_numbers_of_rows_that_round_alike_are_found(
    rounded: Callable[[int], Tensor], left: tuple[int, ...]
) -> None:
    sizes = Sizes(Rounding(rounded), 8, torch.float32)
    assert tuple(size for size in SIZES if sizes.alike(size)) == left
    for rows in range(1, 200):
        assert sizes.of(rows) == next((size for size in left if size >= rows), left[-1])


def test_gpus_have_no_packed_weights() -> None:
    assert not available(torch.device("cuda"), torch.float32)


def test_a_base_for_training_takes_no_rowwise_segments(qwen3_folder: Path) -> None:
    with pytest.raises(AssertionError, match="not packed"):
        run(load_base(str(qwen3_folder)), [1], [None], rowwise=True)


if __name__ == "__main__":
    os.environ["ONEDNN_MAX_CPU_ISA"] = sys.argv[2]  # which it reads when it first computes
    assert alone_and_together(Path(sys.argv[1])) == 1

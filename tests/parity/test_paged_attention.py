"""Decode attention over the paged cache, in Triton and in plain torch, against the attention of one
sequence.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mint_core.model.attention_kernels import Scores, causal_attention
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, blocks_for
from sampler_service.engine.cache.paged_attention import DecodeAttention, plain_attention
from tests.interpreted_kernels import DEVICE, products_by_rows

from sampler_service.engine.cache.paged_kernels import (  # isort: skip  # after interpreted_kernels
    LEAST_SPLIT,
    SPLITS,
    Tiles,
    paged_attention,
)

BOTH = pytest.mark.parametrize("attend", [paged_attention, plain_attention])
# At the borders of blocks and of splits.
LENGTHS = (1, BLOCK_TOKENS, BLOCK_TOKENS + 1, LEAST_SPLIT, LEAST_SPLIT + 1, 2 * LEAST_SPLIT + 44)


@dataclass(frozen=True)
class Cached:
    """Sequences in a cache whose unused places hold NaN."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    lengths: Tensor

    def attend(self, attend: DecodeAttention, scores: Scores, chosen: Sequence[int]) -> Tensor:
        own = list(chosen)
        return attend(
            self.query[own], self.key, self.value, self.table[own], self.lengths[own], scores
        )

    def alone(self, i: int, scores: Scores) -> Tensor:  # [heads, value size] float32
        length = int(self.lengths[i])
        key, value = (
            part[self.table[i]].flatten(0, 1)[:length].transpose(0, 1).float()
            for part in (self.key, self.value)
        )
        return causal_attention(self.query[i][:, None].float(), key, value, scores)[:, 0]


def cached(
    lengths: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),  # of queries and of keys
    sizes: tuple[int, int] = (16, 16),  # of keys and of values
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Cached:
    generator = torch.Generator().manual_seed(seed)
    width = blocks_for(max(lengths)) + 1
    table = torch.randperm(len(lengths) * width, generator=generator).view(len(lengths), width)
    parts = []
    for size in sizes:
        part = torch.randn(table.numel(), BLOCK_TOKENS, heads[1], size, generator=generator)
        for row, length in zip(table, lengths, strict=True):
            own = part[row].flatten(0, 1)
            own[length:] = torch.nan
            part[row] = own.unflatten(0, (width, BLOCK_TOKENS))
        parts.append(part.to(DEVICE, dtype))
    query = torch.randn(len(lengths), heads[0], sizes[0], generator=generator)
    return Cached(
        query.to(DEVICE, dtype),
        parts[0],
        parts[1],
        table.to(DEVICE, torch.int32),
        torch.tensor(lengths, device=DEVICE),
    )


@BOTH
@pytest.mark.parametrize(
    ("changes", "scores"),
    [
        ({}, Scores(0.25)),
        ({"sizes": (24, 40), "heads": (6, 2)}, Scores(0.2)),
        ({"heads": (3, 3)}, Scores(0.25, sliding_window=100)),
        ({"heads": (2, 1)}, Scores(0.5, softcap=1.5)),
        ({"heads": (2, 1)}, Scores(0.5, sliding_window=BLOCK_TOKENS, softcap=1.5)),
        ({"heads": (2, 1)}, Scores(0.5, sliding_window=1)),
    ],
)
def test_a_batch_gets_what_each_sequence_gets_alone(
    attend: DecodeAttention, changes: dict[str, tuple[int, int]], scores: Scores
) -> None:
    sequences = cached(LENGTHS, **changes)  # type: ignore[arg-type]
    output = sequences.attend(attend, scores, range(len(LENGTHS)))
    for i in range(len(LENGTHS)):
        torch.testing.assert_close(output[i], sequences.alone(i, scores), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "window"), [((4, 2), None), ((3, 1), None), ((2, 1), 100)])
def test_rows_of_a_prompt_get_the_same_bits_in_tiles(
    heads: tuple[int, int], window: int | None
) -> None:
    """Where the second split begins, and from the midst of a tile on."""
    scores = Scores(0.25, sliding_window=window)
    spans = [(LEAST_SPLIT - 19, LEAST_SPLIT + 9), (3, 4), (0, 18)]
    sequences = cached([stop for _, stop in spans], heads=heads)
    which = [i for i, (start, stop) in enumerate(spans) for _ in range(start, stop)]
    lengths = [at + 1 for start, stop in spans for at in range(start, stop)]
    query = torch.randn(len(which), heads[0], 16, generator=torch.Generator().manual_seed(5))
    table = sequences.table[which]

    def attend(*rows: slice, of: Sequence[tuple[int, int]]) -> Tensor:
        (own,) = rows or (slice(None),)
        parts = query.to(DEVICE)[own], sequences.key, sequences.value, table[own]
        ends = torch.tensor(lengths[own], device=DEVICE)
        return paged_attention(*parts, ends, scores, Tiles(of, DEVICE))

    with products_by_rows():
        together = attend(of=spans)
        assert len(Tiles(spans, DEVICE).of(8)) < len(which) // 2
        for row in range(0, len(lengths), 6):
            alone = attend(slice(row, row + 1), of=[(lengths[row] - 1, lengths[row])])
            assert torch.equal(alone[0], together[row])
    expected = plain_attention(
        query.to(DEVICE),
        sequences.key,
        sequences.value,
        table,
        torch.tensor(lengths, device=DEVICE),
        scores,
    )
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_is_accumulated_in_float32(
    attend: DecodeAttention, dtype: torch.dtype, unit: float
) -> None:
    """Against float32 over the same rounded inputs: what is left is the rounding of the weights and
    of the result, and does not grow with the length.
    """
    sequences = cached((1, 40, 700), dtype=dtype)
    output = sequences.attend(attend, Scores(0.25), range(3))
    assert output.dtype == dtype
    for i in range(3):
        expected = sequences.alone(i, Scores(0.25))
        assert (output[i].float() - expected).abs().max() <= 4 * unit * expected.abs().max()


def test_long_sequences_are_cut_into_larger_splits() -> None:
    longest = SPLITS * LEAST_SPLIT
    sequences = cached((longest, longest + 1), heads=(1, 1))
    output = sequences.attend(paged_attention, Scores(0.25), range(2))
    for i in range(2):
        torch.testing.assert_close(
            output[i], sequences.alone(i, Scores(0.25)), rtol=1e-5, atol=1e-5
        )


def test_what_a_sequence_gets_does_not_depend_on_its_neighbours() -> None:
    scores = Scores(0.25, sliding_window=200)
    sequences = cached(LENGTHS)
    batch = sequences.attend(paged_attention, scores, range(len(LENGTHS)))
    for company in ([5], [5, 0], [3, 5, 5, 1]):
        output = sequences.attend(paged_attention, scores, company)
        for row, i in zip(output, company, strict=True):
            assert torch.equal(row, batch[i])


def test_a_sequence_of_nan_harms_nobody_else() -> None:
    sequences = cached((300, 140))
    clean = sequences.attend(paged_attention, Scores(0.25), range(2))
    sequences.value[sequences.table[0]] = torch.nan
    output = sequences.attend(paged_attention, Scores(0.25), range(2))
    assert output[0].isnan().all()
    assert torch.equal(output[1], clean[1])


@pytest.mark.parametrize(
    "of", [pytest.param((), id="few"), pytest.param(("--all",), id="all", marks=pytest.mark.slow)]
)
def test_the_kernels_compile_for_gpus_that_are_not_here(of: Sequence[str], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.compiled_kernels", *of]
    subprocess.run(command, env=environment, check=True, timeout=280)

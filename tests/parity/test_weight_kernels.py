"""The kernels in which a row's bits depend on that row alone, against torch's products. Without a
GPU they run in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.interpreted_kernels import DEVICE, products_by_rows

from mint_core.lora.weight_kernels import (  # isort: skip  # after interpreted_kernels
    OUTPUTS,
    PLAIN_ROWS,
    multiply_plain,
    weight_splits,
)

# Sides that no block divides; the inner one in one split and in several.
SHAPES = ((70, 130), (OUTPUTS, 1100), (7, 64))
KINDS = (torch.float32, torch.bfloat16)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("out", "inner"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 67])
def test_the_kernel_gives_what_a_linear_layer_does(
    rows: int, biased: bool, out: int, inner: int, dtype: torch.dtype
) -> None:
    x, weight = drawn(rows, inner, dtype=dtype), drawn(out, inner, seed=1, dtype=dtype)
    bias = drawn(out, seed=2, dtype=dtype) if biased else None
    expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    near = 1e-5 if dtype == torch.float32 else 2**-6  # the interpreter cuts bits off
    assert (multiply_plain(x, weight, bias) - expected).abs().max() <= near * expected.abs().max()


def test_splits_follow_from_the_weight_alone() -> None:
    splits = [weight_splits(torch.empty(shape, device="meta")) for shape in SHAPES]
    assert splits == [1, 4, 1]
    wide = torch.empty(24_576, 4096, device="meta"), torch.empty(4096, 12_288, device="meta")
    assert [weight_splits(weight) for weight in wide] == [1, 2]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("out", "inner"), SHAPES[:2])
def test_a_rows_bits_are_the_same_among_any_number_of_others(
    out: int, inner: int, dtype: torch.dtype
) -> None:
    most = 2 * PLAIN_ROWS[dtype.itemsize] + 5
    x, weight = drawn(most, inner, dtype=dtype), drawn(out, inner, seed=1, dtype=dtype)
    bias = drawn(out, seed=2, dtype=dtype)

    @settings(max_examples=8)
    @given(st.integers(0, most - 1), st.integers(1, most))
    def check(first: int, rows: int) -> None:
        part = slice(first, first + rows)
        assert torch.equal(multiply_plain(x[part], weight, bias), whole[part])

    with products_by_rows():
        whole = multiply_plain(x, weight, bias)
        check()

"""Rows are alike however many there are, of products and of functions of single numbers, or the
server says that they are not.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mint_core.lora.groups import LinearShape
from mint_core.lora.products import onednn
from mint_core.lora.segments import MIN_ROWS, VECTOR_BYTES, one_by_one, rows_apart
from mint_core.model import reproducible
from mint_core.model.reproducible import ToldTails, rows_are_alike

SHAPES = [LinearShape(576, 576), LinearShape(1536, 576), LinearShape(64, 128)]


@pytest.mark.parametrize("product", [functional.linear, onednn.product])
def test_rows_are_alike_in_the_mode_that_was_asked_for(product: onednn.Product) -> None:
    assert rows_are_alike([(product, shape) for shape in SHAPES])


def test_what_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproducible, "_TRIED_ROWS", (MIN_ROWS,))

    def another_last_bit(left: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        product = functional.linear(left, weight)
        return product * (1 + 2**-23) if len(left) == MIN_ROWS else product

    assert not rows_are_alike([(another_last_bit, shape) for shape in SHAPES])


@pytest.mark.parametrize(("inner", "outer"), [(8, 64), (64, 8), (1536, 8)])
def test_one_row_is_the_same_alone_and_beside_others(inner: int, outer: int) -> None:
    rows, matrix = torch.randn(5, inner), torch.randn(outer, inner).t()
    together = one_by_one(rows, matrix)
    for count in range(1, 5):
        assert torch.equal(one_by_one(rows[:count], matrix), together[:count])


def test_a_mode_that_its_user_has_chosen_stays() -> None:
    code = (
        "import os; from mint_core.model.reproducible import ask_for_reproducible_products as ask;"
        "ask(); print(os.environ['MKL_CBWR'])"
    )
    environment = os.environ | {"MKL_CBWR": "COMPATIBLE"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "COMPATIBLE"


ROWS = 13


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def turned(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)[:, ::2]


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (Tensor.clone, rows_apart, turned, every_other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 4, 33, 100])
def test_numbers_that_are_computed_one_by_one_are_named(
    layout: Callable[[Tensor], Tensor], width: int
) -> None:
    """Each whose bits are other than those of a whole vector, and none where there is no such."""
    differ = torch.zeros(ROWS, width, dtype=torch.bool)
    for seed in range(100):
        x = drawn(ROWS, width, seed)
        missing = -x.numel() % VECTOR_BYTES
        whole = functional.softplus(functional.pad(x.flatten(), (0, missing)))
        differ |= functional.softplus(layout(x)) != whole[: x.numel()].view_as(x)
    x = layout(drawn(ROWS, width))
    result = functional.softplus(x)
    reproducible.computed_singly(result.zero_(), [x]).fill_(1.0)
    assert not (differ & (result == 0.0)).any()


@pytest.mark.parametrize("function", [torch.sigmoid, functional.silu, functional.softplus])
@pytest.mark.parametrize("width", [4, 48, 100])
def test_rows_apart_share_no_vectors(function: Callable[[Tensor], Tensor], width: int) -> None:
    """Forward and backward; and rows that are not apart do, as far as the probe is told."""

    def beside(others: int, layout: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = layout(drawn(48, width)[: ROWS + others]).requires_grad_()
        with ToldTails():
            y = function(x)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return y[:ROWS].detach(), gradient[:ROWS]

    close, apart = (
        [beside(n, layout) for n in (0, 2, 35)] for layout in (Tensor.clone, rows_apart)
    )
    for number in (0, 1):  # forward, backward
        assert all(torch.equal(found[number], apart[0][number]) for found in apart)
    differs = not torch.equal(
        function(drawn(1, 4096)[0]),
        torch.cat([function(part) for part in drawn(1, 4096)[0].split(15)]),
    )
    assert differs == (not all(torch.equal(found[0], close[0][0]) for found in close))


def test_what_fills_whole_vectors_stays_as_it_is() -> None:
    x = drawn(ROWS, 64)
    assert rows_apart(x) is x
    narrow = drawn(ROWS, 4)
    assert torch.equal(rows_apart(narrow), narrow)
    assert rows_apart(narrow).stride() == (32, 1)
    assert rows_apart(narrow.bfloat16()).stride() == (64, 1)


def test_exact_functions_are_left_alone() -> None:
    x = drawn(ROWS, 5)
    with ToldTails():
        found = [x * x, x + 1.0, x.abs().sqrt(), x.clamp(min=0.0), x.bfloat16()]
    expected = [x * x, x + 1.0, x.abs().sqrt(), x.clamp(min=0.0), x.bfloat16()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

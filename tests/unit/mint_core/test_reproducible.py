"""Rows of products are alike however many there are, or the server says that they are not."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from mint_core.lora.groups import LinearShape
from mint_core.lora.products import onednn
from mint_core.lora.segments import MIN_ROWS, one_by_one
from mint_core.model import reproducible
from mint_core.model.reproducible import rows_are_alike

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

"""Products whose bits depend on nothing but their own rows, where a CPU's library can be had to
compute so.

Intel's MKL chooses kernels by the number of rows, and on processors with AVX-512 those of fewer
than 16 rows add up in another order than those of many. In its strict mode they do not. Measured
on one thread of a Xeon with AVX-512 (2026-11-29, torch 2.13): the same speed from 8 rows on, half
of it for a single one; without it rows of [n, 576] x [576, 576] differ for each n below 16.
"""

import os
from collections.abc import Iterable

import torch

from mint_core.lora.groups import LinearShape
from mint_core.lora.products.onednn import Product, is_intel
from mint_core.lora.segments import MIN_ROWS

_VARIABLE = "MKL_CBWR"  # which MKL reads before its first product
_MODES = {"AVX512": "AVX512,STRICT", "AVX2": "AVX2,STRICT"}
_TRIED_ROWS = (MIN_ROWS, 5, 7, 15, 16, 33, 70)
_ROWS = 96


def ask_for_reproducible_products() -> None:
    """Has MKL compute rows alike however many there are, unless its user has chosen otherwise."""
    mode = _MODES.get(torch.backends.cpu.get_cpu_capability())
    if mode is not None and is_intel():  # on others' processors MKL goes ways of its own
        os.environ.setdefault(_VARIABLE, mode)


@torch.no_grad()
def rows_are_alike(
    products: Iterable[tuple[Product, LinearShape]], dtype: torch.dtype = torch.float32
) -> bool:
    """Whether the rows of products are the same, bit for bit, with whatever number of others from
    MIN_ROWS on: x W^T, and dy W on the way back.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {(product, s.in_features, s.out_features) for product, s in products}
    for product, inner, outer in shapes:
        weight = torch.randn(outer, inner, generator=generator).to(dtype)
        for matrix in (weight, weight.t()):
            left = torch.randn(_ROWS, matrix.shape[1], generator=generator).to(dtype)
            whole = product(left, matrix)
            if not all(torch.equal(product(left[-n:], matrix), whole[-n:]) for n in _TRIED_ROWS):
                return False
    return True

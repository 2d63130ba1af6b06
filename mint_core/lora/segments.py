"""Segments of the stream, and what one adapter does to its own.

n: rows of a segment. r: stored rank.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.groups import ModuleGroup

MIN_ROWS = 4  # a matmul with fewer rows takes another kernel, whose last bits differ
VECTOR_BYTES = 128  # that a CPU computes at a time, at most: two of its vectors


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive rows of the stream that share an adapter."""

    start: int
    stop: int  # at least start + MIN_ROWS, or rowwise
    row: AdapterRow | None = None  # None: the base model alone
    accumulate: bool = False  # whether backward adds to the row's gradient
    # Whether the adapter is applied to one row at a time: then rows may be fewer, and none's bits
    # depend on how many they are. For few, and for passes without backward.
    rowwise: bool = False

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def adapter_weights(
    segment: Segment, group: ModuleGroup, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a group of one module, in the type that the base computes in."""
    assert segment.row is not None
    own = segment.row.group(Part.WEIGHTS, group)
    return own.a.to(dtype), own.b[0].to(dtype)


def scale(segment: Segment) -> float:
    assert segment.row is not None
    return segment.row.spec.scale


def adapter_forward(
    segment: Segment,
    group: ModuleGroup,  # of one module
    x: Tensor,  # [n, in]
    y: Tensor,  # [n, out], added to
) -> Tensor:  # [n, r], x A^T
    """Adds what the adapter makes of a segment's rows."""
    a, b = adapter_weights(segment, group, x.dtype)
    if segment.rowwise:
        h = one_by_one(x, a.t())
        y.add_(one_by_one(h * scale(segment), b.t()))
    else:
        h = x @ a.t()
        y.addmm_(h, b.t(), alpha=scale(segment))
    return h


def adapter_backward(
    segment: Segment,
    group: ModuleGroup,  # of one module
    x: Tensor,  # [n, in]
    h: Tensor,  # [n, r], x A^T
    dy: Tensor,  # [n, out]
) -> Tensor:  # [n, in]
    """The adapter's share of dx; adds dA and dB to the gradient if the segment accumulates."""
    assert segment.row is not None
    a, b = adapter_weights(segment, group, x.dtype)
    factor = scale(segment)
    dh = dy @ b  # [n, r], but for the factor
    if segment.accumulate:
        gradient = segment.row.group(Part.GRADIENT, group)
        add_product(gradient.a, dh.t(), x, factor)
        add_product(gradient.b[0], dy.t(), h, factor)
    return (dh @ a).mul_(factor)


def one_by_one(rows: Tensor, matrix: Tensor) -> Tensor:  # [n, k], [k, m] -> [n, m]
    """The product, each row as if it were alone."""
    count = rows.shape[0]
    if count > 1 or not rows.is_cpu:
        return torch.bmm(rows[:, None], matrix.expand(count, -1, -1))[:, 0]
    if _one_is_like_two():
        return rows.mm(matrix)
    return torch.bmm(rows.expand(2, 1, -1), matrix.expand(2, -1, -1))[0]


def products(left: Tensor, right: Tensor) -> Tensor:  # [S, 1, k], [S, k, m] -> [S, 1, m]
    """Products of a row each, whose bits do not depend on how many they are."""
    if left.shape[0] == 1:
        return one_by_one(left[0], right[0])[None]
    return torch.bmm(left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Adds factor times left @ right, which may be of a shorter type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=factor)
    elif _adds_to_longer(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=factor, out=total)
    else:
        total.add_(left @ right, alpha=factor)


def rows_apart(y: Tensor) -> Tensor:  # [n, m]
    """The same, with gaps between rows that fill no whole vectors: torch then computes functions of
    single numbers row by row, and else over all rows as one, in vectors that neighbours share, and
    what is left at the end by other code, with other last bits.
    """
    missing = -y.shape[1] % (VECTOR_BYTES // y.element_size())
    if not missing or not y.is_cpu:
        return y
    # No view: models may change it in place.
    apart = torch.empty_strided(y.shape, (y.shape[1] + missing, 1), dtype=y.dtype)
    return apart.copy_(y)


@cache
def _one_is_like_two() -> bool:
    """Whether a product that is alone has the bits of one of several. In MKL's strict mode it goes
    another way.
    """
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(64, 576, generator=generator).t().expand(2, -1, -1)
    left = torch.randn(2, 1, 576, generator=generator)
    return torch.equal(left[0].mm(right[0]), torch.bmm(left, right)[0])


@cache
def _adds_to_longer(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of a shorter type to float32 there, in one call and unrounded;
    tried with numbers that would show it.
    """
    if device.type != "cuda":
        return False
    total = torch.ones(16, 16, device=device)
    left = torch.full((16, 16), 1 + 2**-7, dtype=dtype, device=device)
    expected = 1 + 2 * (left.double() @ left.double())
    try:
        torch.addmm(total, left.t(), left, out_dtype=torch.float32, alpha=2.0, out=total)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(total.double(), expected)

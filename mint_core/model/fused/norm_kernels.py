"""Triton kernels of an RMS norm and of the sum before it. Import this where Triton is there.

T: rows of the stream. d: width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_sum(
    x,  # [T, d]
    added,  # [T, d]
    weight,  # [d]
    total,  # [T, d], written
    y,  # [T, d], written
    eps,
    width,
    ROOM: tl.constexpr,
    ADDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, ROOM)
    inside = place < width
    numbers = tl.load(x + row + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        numbers += tl.load(added + row + place, mask=inside, other=0.0).to(tl.float32)
        rounded = numbers.to(total.dtype.element_ty)
        tl.store(total + row + place, rounded, mask=inside)
        numbers = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / width + eps)
    factors = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + place, numbers * scale * factors, mask=inside)


@triton.jit
def norm_back(
    total,  # [T, d]
    weight,  # [d]
    dy,  # [T, d]
    passed,  # [T, d], gradient of the sum itself
    dx,  # [T, d], written
    eps,
    width,
    ROOM: tl.constexpr,
    ADDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, ROOM)
    inside = place < width
    numbers = tl.load(total + row + place, mask=inside, other=0.0).to(tl.float32)
    factors = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dy + row + place, mask=inside, other=0.0).to(tl.float32) * factors
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / width + eps)
    # d scale / d x = - scale^3 x / width
    along = tl.sum(upstream * numbers, 0) * scale * scale * scale / width
    gradient = upstream * scale - numbers * along
    if ADDS:
        gradient += tl.load(passed + row + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row + place, gradient, mask=inside)


def normed_sum(
    x: Tensor,  # [..., d]
    added: Tensor | None,  # as x
    weight: Tensor,  # [d]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + added, rounded as torch rounds it, and its norm times the weight, each as x."""
    x = x.contiguous()
    added = None if added is None else added.contiguous()
    total = x if added is None else torch.empty_like(x)
    y = torch.empty_like(x)
    width = x.shape[-1]
    norm_sum[(x.numel() // width,)](
        x,
        x if added is None else added,
        weight,
        total,
        y,
        eps,
        width,
        ROOM=triton.next_power_of_2(width),
        ADDS=added is not None,
        num_warps=4,
    )
    return total, y


def normed_sum_back(
    total: Tensor,  # [..., d]
    weight: Tensor,  # [d]
    eps: float,
    dy: Tensor,  # as total
    passed: Tensor | None,  # as total: what else is asked of the sum
) -> Tensor:
    """The gradient of either side of the sum, as total."""
    dy = dy.contiguous()
    passed = None if passed is None else passed.contiguous()
    dx = torch.empty_like(total)
    width = total.shape[-1]
    norm_back[(total.numel() // width,)](
        total,
        weight,
        dy,
        dy if passed is None else passed,
        dx,
        eps,
        width,
        ROOM=triton.next_power_of_2(width),
        ADDS=passed is not None,
        num_warps=4,
    )
    return dx

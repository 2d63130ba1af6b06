"""Triton kernels of the product in a gated MLP. Import this where Triton is there.

T: rows of the stream. f: width of gate and of up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU, TANH_GELU = 0, 1
PLACES = 1024  # of a program
_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)
_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _activated(gate, KIND: tl.constexpr):
    """The activation and its derivative."""
    if KIND == 0:
        small = tl.exp(-tl.abs(gate))  # which cannot overflow
        sigmoid = tl.where(gate >= 0.0, 1.0, small) / (1.0 + small)
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    else:
        inner = _SQRT_2_OVER_PI * (gate + _CUBIC * gate * gate * gate)
        small = tl.exp(-2.0 * tl.abs(inner))
        tanh = tl.where(inner >= 0.0, 1.0 - small, small - 1.0) / (1.0 + small)
        value = 0.5 * gate * (1.0 + tanh)
        inner_slope = _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * gate * gate)
        slope = 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * inner_slope
    return value, slope


@triton.jit
def gate_product(
    wide,  # [T, 2 f] gate and up
    output,  # [T, f], written
    half,
    wide_row,
    PLACES: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    inside = place < half
    gate = tl.load(wide + row * wide_row + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide + row * wide_row + half + place, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activated(gate, KIND)
    # Rounded between, as two operations do.
    value = value.to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * half + place, value * up, mask=inside)


@triton.jit
def gate_back(
    wide,  # [T, 2 f]
    dy,  # [T, f]
    gradient,  # [T, 2 f], written
    half,
    wide_row,
    PLACES: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    inside = place < half
    gate = tl.load(wide + row * wide_row + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide + row * wide_row + half + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dy + row * half + place, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activated(gate, KIND)
    to = gradient + row * 2 * half + place
    tl.store(to, upstream * up * slope, mask=inside)
    tl.store(to + half, upstream * value, mask=inside)


def gated(wide: Tensor, kind: int) -> Tensor:  # [T, 2 f] -> [T, f]
    """act(gate) * up, of gate and up side by side."""
    tokens, width = wide.shape
    output = wide.new_empty(tokens, width // 2)
    gate_product[_grid(wide)](
        wide, output, width // 2, wide.stride(0), PLACES=PLACES, KIND=kind, num_warps=4
    )
    return output


def gated_back(wide: Tensor, dy: Tensor, kind: int) -> Tensor:  # [T, 2 f], [T, f] -> [T, 2 f]
    """The gradient of gate and up, side by side."""
    dy = dy.contiguous()
    gradient = torch.empty_like(wide, memory_format=torch.contiguous_format)
    gate_back[_grid(wide)](
        wide, dy, gradient, dy.shape[1], wide.stride(0), PLACES=PLACES, KIND=kind, num_warps=4
    )
    return gradient


def _grid(wide: Tensor) -> tuple[int, int]:
    return wide.shape[0], triton.cdiv(wide.shape[1] // 2, PLACES)

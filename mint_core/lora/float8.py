"""Weights of frozen linear layers as float8 (e4m3fn) numbers with scales; what they multiply stays
as it is.

A layer computes with number times scale, rounded to the type of its input. Scales that are made
here are powers of two, one for each output channel, so that this product is exact in bfloat16: on a
GPU, where kernels read the numbers as they lie, on a CPU, where layers hold the products, and in a
merged model the weights are the same, bit for bit.

out, in: sides of W. s: scales of an output channel, each for `span` of its inputs. T: rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

NUMBERS = torch.float8_e4m3fn
SCALES = "weight_scale"  # a parameter of layers whose weight is of such numbers
# Beyond, W is written out for the product, to which that is little; what a row gets may then depend
# on the pass, as it does without float8. Not timed on a GPU.
MOST_KERNEL_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Float8Matrix:
    """W of linear layers that read one input, side by side."""

    numbers: Tensor  # [out, in] float8
    scales: Tensor  # [out, s] float32

    @property
    def span(self) -> int:
        """Spans are powers of two, so their number tells how long they are."""
        inner, count = self.numbers.shape[1], self.scales.shape[1]
        return inner if count == 1 else 1 << (-(-inner // count) - 1).bit_length()

    def weight(self, dtype: torch.dtype) -> Tensor:  # [out, in]
        """Written out; with torch's products the oracle of the kernels."""
        wide = self.scales
        if wide.shape[1] > 1:
            wide = wide.repeat_interleave(self.span, dim=1)[:, : self.numbers.shape[1]]
        return self.numbers.float().mul_(wide).to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:  # [T, in] -> [T, out]
        """x W^T + b."""
        if x.shape[0] > MOST_KERNEL_ROWS:
            return functional.linear(x, self.weight(x.dtype), bias)
        from mint_core.lora.weight_kernels import multiply  # Triton is not everywhere

        y = multiply(x, self.numbers, self.scales, self.span)
        return y if bias is None else y.add_(bias)

    def back(self, dys: Sequence[Tensor]) -> Tensor:  # each [T, width] -> [T, in]
        """dy W, dy in parts side by side."""
        dy = dys[0] if len(dys) == 1 else torch.cat(list(dys), dim=1)
        if dy.shape[0] > MOST_KERNEL_ROWS:
            return dy @ self.weight(dy.dtype)
        from mint_core.lora.weight_kernels import multiply

        return multiply(dy, self.numbers, self.scales, self.span, back=True)


def quantized(weight: Tensor) -> Float8Matrix:  # [out, in]
    """A weight, rounded to bfloat16 first, so that the type in which it was read changes nothing.
    What is not finite stays so.
    """
    short = weight.to(torch.bfloat16).float()
    # The least power of two that brings the largest number to 448 or below, which is the largest of
    # e4m3fn: 1.75 * 2**8. What is added to the bits makes a mantissa above .75 the next power.
    bits = short.abs().amax(dim=1, keepdim=True).view(torch.int32)
    powers = ((bits + 0x1FFFFF) >> 23).sub_(8).clamp_(min=1)
    scales = (powers << 23).view(torch.float32)
    return Float8Matrix((short / scales).to(NUMBERS), scales)


def side_by_side(linears: Sequence[nn.Linear]) -> Float8Matrix | None:
    """The weights of layers of one kind; None where they are no float8."""
    if linears[0].weight.dtype != NUMBERS:
        return None
    numbers = torch.cat([linear.weight.detach().view(torch.uint8) for linear in linears])
    scales = torch.cat([linear.get_parameter(SCALES).detach() for linear in linears])
    return Float8Matrix(numbers.view(NUMBERS), scales)


def make_float8(linear: nn.Linear, scales: Tensor) -> None:
    """Has a layer, whose weight is about to be numbers, compute with these scales. Slowly: layers
    of groups compute otherwise.
    """
    linear.register_parameter(SCALES, nn.Parameter(scales, requires_grad=False))
    linear.forward = partial(_product, linear)  # type: ignore[method-assign]


def _product(linear: nn.Linear, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
    matrix = Float8Matrix(linear.weight, linear.get_parameter(SCALES))
    return functional.linear(x, matrix.weight(x.dtype), linear.bias)

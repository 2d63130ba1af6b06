"""A Triton kernel of products with float8 weights, which it reads as they lie and takes apart
itself: GPUs before compute capability 8.9 know no e4m3. Import this where Triton is there.

Blocks are of one size, whatever the pass: what a row gets depends on no other, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

ROWS = 32  # of a program
OUTPUTS = 64  # of a program
INNER = 64  # of the side that is summed over, held at once


@triton.jit
def product(
    x,  # [T, inner]
    numbers,  # [out, in], their bits
    scales,  # [out, spans]
    y,  # [T, outer], written
    rows,
    inner,
    outer,
    width,  # in
    spans,
    span,
    x_row,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """y = x W^T; or, back, x W."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there, wanted = row < rows, output < outer
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for at in range(0, inner, INNER):
        k = at + tl.arange(0, INNER)
        inside = k < inner
        left = tl.load(
            x + row[:, None].to(tl.int64) * x_row + k[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        if BACK:
            channel, place = k[:, None].to(tl.int64), output[None, :]
        else:
            channel, place = output[None, :].to(tl.int64), k[:, None]
        known = inside[:, None] & wanted[None, :]
        bits = tl.load(numbers + channel * width + place, mask=known, other=0).to(tl.int16)
        # Sign, four bits of exponent, three of mantissa: at their places of a float16, they are
        # that number over 256. Its two NaNs become 480: weights have none.
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        scale = tl.load(scales + channel * spans + place // span, mask=known, other=0.0)
        right = (half.to(tl.float32) * 256.0 * scale).to(x.dtype.element_ty)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    to = y + row[:, None].to(tl.int64) * outer + output[None, :]
    tl.store(to, total, mask=there[:, None] & wanted[None, :])


def multiply(
    x: Tensor, numbers: Tensor, scales: Tensor, span: int, *, back: bool = False
) -> Tensor:  # [T, in] -> [T, out]; back, [T, out] -> [T, in]
    """The products of rows with a float8 matrix, numbers [out, in], scales [out, spans]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    outer = numbers.shape[1 if back else 0]
    y = x.new_empty(x.shape[0], outer)
    product[(triton.cdiv(outer, OUTPUTS), triton.cdiv(x.shape[0], ROWS))](
        x,
        numbers.view(torch.uint8),
        scales,
        y,
        x.shape[0],
        x.shape[1],
        outer,
        numbers.shape[1],
        scales.shape[1],
        span,
        x.stride(0),
        BACK=back,
        ROWS=ROWS,
        OUTPUTS=OUTPUTS,
        INNER=INNER,
        # The interpreter keeps bfloat16 as integers and would multiply those.
        WIDEN=knobs.runtime.interpret and x.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=2,
    )
    return y

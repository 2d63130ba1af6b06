"""Triton kernels of products with frozen weights, in which a row's bits depend on that row alone,
however many others there are. Import this where Triton is there.

Blocks are of one size, whatever the pass. Float8 weights are read as they lie and taken apart here:
GPUs before compute capability 8.9 know no e4m3. Of others the inner side is cut into splits, by the
shape of the weights alone, which are computed at the same time and added up in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mint_core.lora.column_kernels import product as dot
from mint_core.lora.column_kernels import splits_of

ROWS = 32  # of a program
OUTPUTS = 64  # of a program
INNER = 64  # of the side that is summed over, held at once
# Of a program that multiplies other weights, by bytes of a number: tensor cores take 64 at a time
# on the largest GPUs, and while weights are read more of them cost nothing. float32 is not for
# tensor cores.
PLAIN_ROWS = {2: 64, 4: 16}
PLACES = 1024  # of a program that adds splits up


@triton.jit(do_not_specialize=["rows"])  # one row, or sixteen, must not be compiled otherwise
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
        total += dot(left, right, WIDEN)
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


@triton.jit(do_not_specialize=["rows"])
def multiply_split(
    x,  # [T, in]
    matrix,  # [out, in]
    bias,  # [out]
    y,  # [splits, T, out], written
    rows,
    inner,
    outer,
    split_inner,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
    BIASED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """y = x W^T of each split, and the bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    there, wanted = row < rows, output < outer
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    start = tl.program_id(2) * split_inner
    for at in range(start, tl.minimum(start + split_inner, inner), INNER):
        place = at + tl.arange(0, INNER)
        inside = place < inner
        left = tl.load(
            x + row[:, None].to(tl.int64) * inner + place[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            matrix + output[None, :].to(tl.int64) * inner + place[:, None],
            mask=inside[:, None] & wanted[None, :],
            other=0.0,
        )
        total += dot(left, right, WIDEN)
    if BIASED:
        total += tl.load(bias + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    to = y + (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * outer + output[None, :]
    tl.store(to, total, mask=there[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["count"])
def add_splits(
    partial,  # [splits, T, out] float32
    bias,  # [out]
    y,  # [T, out], written
    count,  # T out
    outer,
    SPLITS: tl.constexpr,
    PLACES: tl.constexpr,
    BIASED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    inside = place < count
    total = tl.load(partial + place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + split * count.to(tl.int64) + place, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + place % outer, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total, mask=inside)


def weight_splits(weight: Tensor) -> int:  # [out, in]
    """How many splits its inner side has: for a program on each multiprocessor and no more, since
    what they make of many rows is more to write than the weights are to read.
    """
    outer, inner = weight.shape
    return splits_of(inner, 2 * triton.cdiv(outer, OUTPUTS))


def multiply_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [T, in] -> [T, out]
    """x W^T + b, W [out, in]."""
    x = x.contiguous()
    (rows, inner), outer = x.shape, weight.shape[0]
    assert weight.is_contiguous()
    size, splits = PLAIN_ROWS[x.element_size()], weight_splits(weight)
    y = x.new_empty(rows, outer)
    parts = y if splits == 1 else x.new_empty(splits, rows, outer, dtype=torch.float32)
    some = weight if bias is None else bias
    multiply_split[(triton.cdiv(rows, size), triton.cdiv(outer, OUTPUTS), splits)](
        x,
        weight,
        some,
        parts,
        rows,
        inner,
        outer,
        triton.cdiv(triton.cdiv(inner, splits), INNER) * INNER,
        ROWS=size,
        OUTPUTS=OUTPUTS,
        INNER=INNER,
        BIASED=bias is not None and splits == 1,
        # The interpreter keeps bfloat16 as integers and would multiply those.
        WIDEN=knobs.runtime.interpret and x.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        add_splits[(triton.cdiv(y.numel(), PLACES),)](
            parts,
            some,
            y,
            y.numel(),
            outer,
            SPLITS=splits,
            PLACES=PLACES,
            BIASED=bias is not None,
        )
    return y

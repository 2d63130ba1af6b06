"""Triton kernels of what adapters do to their own rows of a stream: a launch each for all adapters
and all modules of a group, forward and backward. Import this where Triton is there.

A program works on rows of one adapter alone, in tiles that begin where its segments do: what it
computes depends on them, bit for bit, and on no neighbour. Tenants, ranks and lengths are numbers in
`Tables`; they change no launch.

T: rows of the stream. r: stored rank of an adapter. m: modules of the group. C: m times the largest
r. A program finds the matrices of its adapter by the address of its row: what the bank stores of a
group begins at r times `unit`, and of it each part at r times the part's own place.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mint_core.lora.segment_tables import OUTPUTS, ROWS, GroupTables, Tables

COLUMNS = 32  # of ranks, of a program
INNER = 64  # held at once


@triton.jit
def _product(left, right, WIDEN: tl.constexpr):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def shrink_own(
    x,  # [T, ...]
    h,  # [T, C], written
    adapters,  # [adapters, 5], see `Tables`
    tiles,  # [tiles, 4], see `Tables`
    scales,  # [adapters]
    sides,  # [m, 3], see `GroupTables`
    unit,
    x_row,
    h_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """h = scale * x M^T of each module's M."""
    tile = tiles + tl.program_id(0) * 4
    owner, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    own = adapters + owner * 5
    rank = tl.load(own + 2)
    member = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.program_id(2) * COLUMNS < rank:
        side = sides + member * 3
        first, inner, place = tl.load(side), tl.load(side + 1), tl.load(side + 2)
        numbers = tl.load(own).to(tl.pointer_type(x.dtype.element_ty))
        matrix = numbers + rank * (unit + place)
        row = start + tl.arange(0, ROWS)
        there, used = row < stop, column < rank
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(0, inner, INNER):
            k = at + tl.arange(0, INNER)
            inside = k < inner
            rows = tl.load(
                x + row[:, None] * x_row + (first + k)[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            cut = tl.load(
                matrix + column[None, :] * inner + k[:, None],
                mask=inside[:, None] & used[None, :],
                other=0.0,
            )
            total += _product(rows, cut, WIDEN)
        total *= tl.load(scales + owner)
        to = h + row[:, None] * h_row + (member * rank + column)[None, :]
        tl.store(to, total, mask=there[:, None] & used[None, :])


@triton.jit
def expand_own(
    h,  # [T, C]
    y,  # [T, ...], added to
    adapters,
    tiles,
    outputs,  # [output tiles, 5], see `GroupTables`
    unit,
    h_row,
    y_row,
    joined,  # modules whose matrices are one, [joined r, columns]; else 1
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """y += h M of each module's M."""
    tile = tiles + tl.program_id(0) * 4
    owner, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    own = adapters + owner * 5
    rank = tl.load(own + 2)
    part = outputs + tl.program_id(1) * 5
    at, first, end = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    place, member = tl.load(part + 3), tl.load(part + 4)
    numbers = tl.load(own).to(tl.pointer_type(h.dtype.element_ty))
    matrix = numbers + rank * (unit + place)
    row = start + tl.arange(0, ROWS)
    output = at + tl.arange(0, OUTPUTS)
    there, inside = row < stop, output < end
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    ranks = rank * joined
    for begin in range(0, ranks, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        used = column < ranks
        rows = tl.load(
            h + row[:, None] * h_row + (member * rank + column)[None, :],
            mask=there[:, None] & used[None, :],
            other=0.0,
        )
        cut = tl.load(
            matrix + column[:, None] * (end - first) + (output - first)[None, :],
            mask=used[:, None] & inside[None, :],
            other=0.0,
        )
        total += _product(rows, cut, WIDEN)
    to = y + row[:, None] * y_row + output[None, :]
    known = there[:, None] & inside[None, :]
    tl.store(to, tl.load(to, mask=known, other=0.0).to(tl.float32) + total, mask=known)


@triton.jit
def add_gradient(
    h,  # [T, C]
    z,  # [T, ...]
    adapters,
    tiles,
    outputs,  # as those of `expand_own`, columns of z
    unit,
    h_row,
    z_row,
    joined,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Of each adapter that trains, gradient of M += h^T z of its rows, segment after segment."""
    own = adapters + tl.program_id(0) * 5
    rank = tl.load(own + 2)
    ranks = rank * joined
    address = tl.load(own + 1)
    if (address != 0) & (tl.program_id(2) * COLUMNS < ranks):
        part = outputs + tl.program_id(1) * 5
        at, first, end = tl.load(part), tl.load(part + 1), tl.load(part + 2)
        place, member = tl.load(part + 3), tl.load(part + 4)
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        output = at + tl.arange(0, OUTPUTS)
        used, inside = column < ranks, output < end
        numbers = address.to(tl.pointer_type(tl.float32))
        to = numbers + rank * (unit + place)
        to += column[:, None] * (end - first) + (output - first)[None, :]
        known = used[:, None] & inside[None, :]
        total = tl.load(to, mask=known, other=0.0)
        added = tl.zeros([COLUMNS, OUTPUTS], tl.float32)
        first_tile, tile_count = tl.load(own + 3), tl.load(own + 4)
        for number in range(first_tile, first_tile + tile_count):
            tile = tiles + number * 4
            start, stop = tl.load(tile + 1), tl.load(tile + 2)
            row = start + tl.arange(0, ROWS)
            there = row < stop
            left = tl.load(
                h + row[None, :] * h_row + (member * rank + column)[:, None],
                mask=there[None, :] & used[:, None],
                other=0.0,
            )
            right = tl.load(
                z + row[:, None] * z_row + output[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            added += _product(left, right, WIDEN)
            # As if each segment were alone: its sum is whole before it is added.
            ends = tl.load(tile + 3) == 1
            total = tl.where(ends, total + added, total)
            added = tl.where(ends, 0.0, added)
        tl.store(to, total, mask=known)


def shrink(x: Tensor, tables: Tables, group: GroupTables, *, back: bool = False) -> Tensor:
    """x A^T of all modules [T, C], scaled; or, back, of their outputs' gradient x [T, W], x B. Rows
    without an adapter, and columns beyond its rank, are not set.
    """
    h = x.new_empty(x.shape[0], group.modules * tables.most_rank)
    blocks = triton.cdiv(tables.most_rank, COLUMNS)
    shrink_own[(len(tables.tiles), group.modules, blocks)](
        x,
        h,
        tables.adapters,
        tables.tiles,
        tables.scales,
        group.back_sides if back else group.sides,
        group.unit,
        x.stride(0),
        h.stride(0),
        **_constants(x),
        INNER=INNER,
    )
    return h


def expand(
    h: Tensor, y: Tensor, tables: Tables, group: GroupTables, *, back: bool = False
) -> None:
    """Adds h B^T to y [T, W]; or, back, h A to the input's gradient y [T, in]."""
    outputs, joined = group.outputs_of(back)
    expand_own[(len(tables.tiles), len(outputs))](
        h,
        y,
        tables.adapters,
        tables.tiles,
        outputs,
        group.unit,
        h.stride(0),
        y.stride(0),
        joined,
        **_constants(y),
        OUTPUTS=OUTPUTS,
    )


def accumulate(
    h: Tensor, z: Tensor, tables: Tables, group: GroupTables, *, back: bool = False
) -> None:
    """Adds h^T z to the gradients of B, transposed, with z the outputs' gradient [T, W]; or, back,
    to those of A, with z the input [T, in].
    """
    outputs, joined = group.outputs_of(back)
    blocks = triton.cdiv(joined * tables.most_rank, COLUMNS)
    add_gradient[(len(tables.adapters), len(outputs), blocks)](
        h,
        z,
        tables.adapters,
        tables.tiles,
        outputs,
        group.unit,
        h.stride(0),
        z.stride(0),
        joined,
        **_constants(z),
        OUTPUTS=OUTPUTS,
    )


def _constants(like: Tensor) -> dict[str, Any]:
    # The interpreter keeps bfloat16 as integers and would multiply those.
    widen = knobs.runtime.interpret and like.dtype == torch.bfloat16
    return {"ROWS": ROWS, "COLUMNS": COLUMNS, "WIDEN": widen, "num_warps": 4, "num_stages": 2}

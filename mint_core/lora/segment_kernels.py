"""Triton kernels of what adapters do to their own rows of a stream: a launch each for all adapters
and all modules of a group, forward and backward. Import this where Triton is there.

A program works on rows of one adapter alone, in tiles that begin where its segments do: what it
computes depends on them, bit for bit, and on no neighbour. Tenants, ranks and lengths are numbers
in `Tables`; they change no launch.

T: rows of the stream. r: stored rank of an adapter. m: modules of the group. C: m times the largest
r. A program finds the matrices of its adapter by the address of its row, and rounds what it reads
to the type of the pass: what the bank stores of a group begins at r times `unit`, and of it each
part at r times the part's own place.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mint_core.lora.segment_tables import OUTPUTS, ROWS, GroupTables, Tables

COLUMNS = 32  # of ranks, of a program
INNER = 128  # held at once: few tiles have few programs, each of which reads a whole inner side


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
    row_tiles,  # [tiles, 4], see `Tables`
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
    tile = row_tiles + tl.program_id(0) * 4
    owner, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    own = adapters + owner * 5
    rank = tl.load(own + 2)
    member = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.program_id(2) * COLUMNS < rank:
        side = sides + member * 3
        first, inner, place = tl.load(side), tl.load(side + 1), tl.load(side + 2)
        numbers = tl.load(own).to(tl.pointer_type(tl.float32))
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
            total += _product(rows, cut.to(rows.dtype), WIDEN)
        total *= tl.load(scales + owner)
        to = h + row[:, None] * h_row + (member * rank + column)[None, :]
        tl.store(to, total, mask=there[:, None] & used[None, :])


@triton.jit
def expand_own(
    h,  # [T, C]
    y,  # [T, ...], added to
    adapters,
    row_tiles,
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
    tile = row_tiles + tl.program_id(0) * 4
    owner, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    own = adapters + owner * 5
    rank = tl.load(own + 2)
    part = outputs + tl.program_id(1) * 5
    at, first, end = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    place, member = tl.load(part + 3), tl.load(part + 4)
    numbers = tl.load(own).to(tl.pointer_type(tl.float32))
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
        total += _product(rows, cut.to(rows.dtype), WIDEN)
    to = y + row[:, None] * y_row + output[None, :]
    known = there[:, None] & inside[None, :]
    tl.store(to, tl.load(to, mask=known, other=0.0).to(tl.float32) + total, mask=known)


@triton.jit
def _add_gradient(
    h,  # [T, C]
    z,  # [T, ...]
    own,
    row_tiles,
    part,
    block,
    unit,
    h_row,
    z_row,
    joined,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradient of M += h^T z of an adapter's rows, segment after segment."""
    rank = tl.load(own + 2)
    ranks = rank * joined
    address = tl.load(own + 1)
    if (address != 0) & (block * COLUMNS < ranks):
        at, first, end = tl.load(part), tl.load(part + 1), tl.load(part + 2)
        place, member = tl.load(part + 3), tl.load(part + 4)
        column = block * COLUMNS + tl.arange(0, COLUMNS)
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
            tile = row_tiles + number * 4
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


@triton.jit
def add_gradients(
    h,  # [T, C] x A^T
    dh,  # [T, C] dy B
    x,  # [T, in]
    dy,  # [T, W]
    adapters,
    row_tiles,
    inputs,  # [input tiles, 5], as the outputs of `expand_own`, columns of x
    outputs,  # [output tiles, 5], columns of dy
    input_tiles,
    unit,
    h_row,
    x_row,
    dy_row,
    modules,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Of each adapter that trains: A += dh^T x, and B, transposed, += h^T dy of each module."""
    own = adapters + tl.program_id(0) * 5
    which, block = tl.program_id(1), tl.program_id(2)
    if which < input_tiles:
        _add_gradient(
            dh,
            x,
            own,
            row_tiles,
            inputs + which * 5,
            block,
            unit,
            h_row,
            x_row,
            modules,
            ROWS,
            COLUMNS,
            OUTPUTS,
            WIDEN,
        )
    else:
        _add_gradient(
            h,
            dy,
            own,
            row_tiles,
            outputs + (which - input_tiles) * 5,
            block,
            unit,
            h_row,
            dy_row,
            1,
            ROWS,
            COLUMNS,
            OUTPUTS,
            WIDEN,
        )


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


def expand(h: Tensor, y: Tensor, tables: Tables, group: GroupTables, *, back: bool = False) -> None:
    """Adds h B^T to y [T, W]; or, back, h A to the input's gradient y [T, in]."""
    outputs, joined = (group.inputs, group.modules) if back else (group.outputs, 1)
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
    h: Tensor, dh: Tensor, x: Tensor, dy: Tensor, tables: Tables, group: GroupTables
) -> None:
    """Adds to the gradients of A and B; h and dh as `shrink` made them of x and, back, of dy."""
    inputs, outputs = group.inputs, group.outputs
    blocks = triton.cdiv(group.modules * tables.most_rank, COLUMNS)
    add_gradients[(len(tables.adapters), len(inputs) + len(outputs), blocks)](
        h,
        dh,
        x,
        dy,
        tables.adapters,
        tables.tiles,
        inputs,
        outputs,
        len(inputs),
        group.unit,
        h.stride(0),
        x.stride(0),
        dy.stride(0),
        group.modules,
        **_constants(x),
        OUTPUTS=OUTPUTS,
    )


def _constants(like: Tensor) -> dict[str, Any]:
    # The interpreter keeps bfloat16 as integers and would multiply those.
    widen = knobs.runtime.interpret and like.dtype == torch.bfloat16
    return {"ROWS": ROWS, "COLUMNS": COLUMNS, "WIDEN": widen, "num_warps": 4, "num_stages": 2}

"""Triton kernels of what `ActiveColumns` adds: two launches for a group of modules, however many
modules and adapters there are. Import this where Triton is there.

Columns that none of some rows own are neither read, multiplied nor written; decoding has an
adapter's rows side by side, so that few rows at a time own few columns. The inner side of the first
product is cut into splits, which are computed at the same time and added up by the second kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mint_core.lora.kernels import TILE

PROGRAMS = 264  # two for each multiprocessor of the largest GPUs: more splits gain nothing
MOST_SPLITS = 16
LEAST_SPLIT = 256  # numbers of the inner side
INNER = 128  # held at once
COLUMNS = TILE  # of a program
OUTPUTS = 64  # of a program
ROWS = 16  # of a program: the fewest of a matrix product


@triton.jit
def product(left, right, WIDEN: tl.constexpr):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=["n"])  # one row, or sixteen, must not be compiled otherwise
def shrink(
    x,  # [n, in]
    a,  # [modules, size, in]
    owners,  # [n]
    column_owners,  # [size]
    scales,  # [size]
    partial,  # [splits, n, modules, columns] float32
    n,
    columns,
    size,
    inner,
    split_inner,
    x_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tiles = tl.cdiv(columns, COLUMNS)
    member = tl.program_id(1) // tiles
    modules = tl.num_programs(1) // tiles
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    there, used = row < n, column < columns
    asks = tl.load(owners + row, mask=there, other=-1)
    has = tl.load(column_owners + column, mask=used, other=-2)
    own = asks[:, None] == has[None, :]
    if tl.max(tl.max(own.to(tl.int32), 1), 0) > 0:
        h = tl.zeros([ROWS, COLUMNS], tl.float32)
        start = tl.program_id(2) * split_inner
        matrix = a + (member * size + column).to(tl.int64)[None, :] * inner
        for at in range(start, tl.minimum(start + split_inner, inner), INNER):
            place = at + tl.arange(0, INNER)
            inside = place < inner
            rows = tl.load(
                x + row[:, None] * x_row + place[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            cut = tl.load(
                matrix + place[:, None], mask=inside[:, None] & used[None, :], other=0.0
            )  # [inner, columns]
            h += product(rows, cut, WIDEN)
        factor = tl.load(scales + column, mask=used, other=0.0).to(tl.float32)
        # Cut out, not multiplied by 0: what others' columns make of a row may be infinite.
        h = tl.where(own, h * factor[None, :], 0.0)
        to = ((tl.program_id(2) * n + row[:, None]) * modules + member) * columns + column[None, :]
        tl.store(partial + to, h, mask=there[:, None] & used[None, :])


@triton.jit(do_not_specialize=["n"])
def expand(
    partial,  # [splits, n, modules, columns] float32
    b,  # of each module [size, out], one after the other
    owners,  # [n]
    column_owners,  # [size]
    tiles,  # [tiles, 4] see `output_tiles`
    y,  # [n, width], added to
    n,
    modules,
    columns,
    size,
    y_row,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tiles + tl.program_id(1) * 4
    first, module_start = tl.load(tile), tl.load(tile + 1)
    outputs, member = tl.load(tile + 2), tl.load(tile + 3)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = first - module_start + tl.arange(0, OUTPUTS)
    there, inside = row < n, output < outputs
    asks = tl.load(owners + row, mask=there, other=-1)
    matrix = b + module_start.to(tl.int64) * size + output[None, :]
    added = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for at in range(0, columns, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        used = column < columns
        has = tl.load(column_owners + column, mask=used, other=-2)
        if tl.max(tl.max((asks[:, None] == has[None, :]).to(tl.int32), 1), 0) > 0:
            place = partial + (row[:, None] * modules + member) * columns + column[None, :]
            known = there[:, None] & used[None, :]
            h = tl.load(place, mask=known, other=0.0)
            for split in tl.static_range(1, SPLITS):
                h += tl.load(place + split * n * modules * columns, mask=known, other=0.0)
            cut = tl.load(
                matrix + column.to(tl.int64)[:, None] * outputs,
                mask=used[:, None] & inside[None, :],
                other=0.0,
            )  # [columns, outputs]
            added += product(h.to(cut.dtype), cut, WIDEN)
    to = y + row[:, None] * y_row + (module_start + output)[None, :]
    known = there[:, None] & inside[None, :]
    tl.store(to, tl.load(to, mask=known, other=0.0).to(tl.float32) + added, mask=known)


def output_tiles(widths: tuple[int, ...], device: torch.device) -> Tensor:  # [tiles, 4] int32
    """What each program of `expand` computes: the first of its columns in all outputs side by side,
    the first of its module's, how many the module has, and which module it is.
    """
    rows, start = [], 0
    for member, width in enumerate(widths):
        rows += [(start + at, start, width, member) for at in range(0, width, OUTPUTS)]
        start += width
    return torch.tensor(rows, dtype=torch.int32, device=device)


def add_own(
    x: Tensor,  # [n, in]
    y: Tensor,  # [n, width], added to
    a: Tensor,  # [modules, size, in]
    b: Tensor,  # [size * width], of each module [size, out]
    owners: Tensor,  # [n]
    columns: tuple[Tensor, Tensor],  # owners and scales of those of the pass, each [columns]
    tiles: Tensor,  # [tiles, 4]
    splits: int | None = None,  # of the inner side; None: as many as keep a GPU busy
) -> None:
    """Adds to each row what its own columns make of it, as `ActiveColumns` says it slowly."""
    assert x.stride(1) == y.stride(1) == 1
    (n, inner), (modules, size, _) = x.shape, a.shape
    column_owners, scales = columns
    count = len(column_owners)
    parts, blocks = triton.cdiv(n, ROWS), triton.cdiv(count, COLUMNS)
    # So many programs have something to do.
    splits = splits or splits_of(inner, modules * (parts + blocks))
    partial = x.new_empty(splits, n, modules, count, dtype=torch.float32)
    split_inner = triton.cdiv(triton.cdiv(inner, splits), INNER) * INNER
    # The interpreter keeps bfloat16 as integers and would multiply those.
    widen = knobs.runtime.interpret and x.dtype == torch.bfloat16
    shrink[(parts, modules * blocks, splits)](
        x,
        a,
        owners,
        column_owners,
        scales,
        partial,
        n,
        count,
        size,
        inner,
        split_inner,
        x.stride(0),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INNER=INNER,
        WIDEN=widen,
        num_warps=4,
        num_stages=3,
    )
    expand[(parts, len(tiles))](
        partial,
        b,
        owners,
        column_owners,
        tiles,
        y,
        n,
        modules,
        count,
        size,
        y.stride(0),
        SPLITS=splits,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        OUTPUTS=OUTPUTS,
        WIDEN=widen,
        num_warps=4,
        num_stages=2,
    )


def splits_of(inner: int, programs: int) -> int:
    """How many splits of the inner side keep a GPU busy beside so many programs; a power of two."""
    most = min(MOST_SPLITS, inner // LEAST_SPLIT, PROGRAMS // programs)
    return 1 << max(0, most.bit_length() - 1)

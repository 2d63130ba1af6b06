"""Triton kernels of attention over the paged key/value cache. Import this where Triton is there.

The keys of each sequence are cut into splits, which are computed at the same time and put together
afterwards. How they are cut follows from the sequence's own length, whatever else is in the batch:
so what it gets does not depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mint_core.lora.column_kernels import ROWS as LEAST_ROWS
from mint_core.lora.column_kernels import product
from mint_core.model.attention_kernels import Scores
from sampler_service.engine.cache.blocks import BLOCK_TOKENS
from sampler_service.engine.cache.paged_attention import DecodeAttention

# Most of a sequence: with 8 key heads and one sequence, two programs per multiprocessor.
SPLITS = 32
LEAST_SPLIT = 128  # tokens; fewer and the partial results weigh against the keys read
TILE_BYTES = 16 * 1024  # of keys held at once; as much again of values
MOST_TILE = 64  # tokens of them
NO_WINDOW = 2**30


class Tiles:
    """Queries that a program computes together: of one sequence, each behind the one before it, and
    as many as have room among the rows of a product. What each gets is the same, bit for bit.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], device: torch.device) -> None:
        """Of rows of sequences side by side, the first position of each and the end."""
        self._spans = spans
        self._device = device
        self._of: dict[int, Tensor] = {}

    def of(self, most: int) -> Tensor:  # [tiles, 2] int32
        """Of at most so many, a power of two: the first one's row, and how many. They begin at
        multiples: then keys are cut alike for all.
        """
        if most not in self._of:
            tiles, row = [], 0
            for start, stop in self._spans:
                at = start
                while at < stop:
                    count = min(most - at % most, stop - at)
                    tiles.append((row, count))
                    row, at = row + count, at + count
            self._of[most] = torch.tensor(tiles, dtype=torch.int32, device=self._device)
        return self._of[most]


def tiled(
    attend: Callable[..., Tensor], device: torch.device, spans: Sequence[tuple[int, int]]
) -> DecodeAttention:
    """`paged_attention` of a pass over these."""
    return partial(attend, tiles=Tiles(spans, device))


@triton.jit
def _cut(length, window, SPLITS: tl.constexpr, LEAST_SPLIT: tl.constexpr, TILE: tl.constexpr):
    """The first key that is seen, and how many keys a split has."""
    first = tl.maximum(length - window, 0)
    tiles = tl.cdiv(length - first, SPLITS * TILE)
    return first, tl.maximum(tiles * TILE, LEAST_SPLIT)


@triton.jit
def attend_split(
    query,  # [n, heads, key size]
    key,  # [blocks, block tokens, key heads, key size]
    value,  # [blocks, block tokens, key heads, value size]
    table,  # [n, most blocks]
    lengths,  # [n], at least 1
    tiles,  # [tiles, 2], see `Tiles`, or anything
    partial,  # [n, heads, splits, value size] float32
    weight,  # [n, heads, splits] float32, logarithm of the sum of the exponentiated scores
    scaling,
    softcap,
    window,
    query_row,
    query_head,
    key_block,
    key_token,
    key_head,
    value_block,
    value_token,
    value_head,
    table_row,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEY_ROOM: tl.constexpr,  # sizes filled up to powers of two
    VALUE_ROOM: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a key head
    GROUP_ROOM: tl.constexpr,  # rows of each of the queries of a tile
    TILED: tl.constexpr,  # whether there are tiles, or each query is one
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    sequence, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = 1
    if TILED:
        tile = tiles + sequence * 2
        sequence, count = tl.load(tile).to(tl.int32), tl.load(tile + 1).to(tl.int32)
    length = tl.load(lengths + sequence).to(tl.int32)
    # Of all queries of a tile keys are cut in the same way: it holds none beside whom they differ.
    first, size = _cut(length, window, SPLITS, LEAST_SPLIT, TILE)
    start = first + split * size
    last = length + count - 1
    stop = tl.minimum(start + size, last)
    if start < last:
        rows = tl.arange(0, ROWS)
        place_of = rows // GROUP_ROOM
        asking = sequence + place_of
        own_stop = tl.minimum(start + size, length + place_of)
        key_sizes = tl.arange(0, KEY_ROOM)
        value_sizes = tl.arange(0, VALUE_ROOM)
        heads = group * GROUP + rows % GROUP_ROOM
        in_group = (rows % GROUP_ROOM < GROUP) & (place_of < count)
        asked = tl.load(
            query + asking[:, None] * query_row + heads[:, None] * query_head + key_sizes[None, :],
            mask=in_group[:, None] & (key_sizes < KEY_SIZE)[None, :],
            other=0.0,
        )  # [rows, key size]
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        output = tl.zeros([ROWS, VALUE_ROOM], tl.float32)
        for at in range(start, stop, TILE):
            tokens = at + tl.arange(0, TILE)
            seen = tokens < stop
            blocks = tl.load(
                table + sequence * table_row + tokens // BLOCK_TOKENS, mask=seen, other=0
            )
            blocks = blocks.to(tl.int64)  # a layer may hold more than 2**31 numbers
            places = tokens % BLOCK_TOKENS
            key_at = blocks * key_block + places * key_token + group * key_head
            keys = tl.load(
                key + key_at[None, :] + key_sizes[:, None],
                mask=seen[None, :] & (key_sizes < KEY_SIZE)[:, None],
                other=0.0,
            )  # [key size, tile]
            scores = product(asked, keys, WIDEN) * scaling  # [rows, tile]
            if CAPPED:
                # tanh x = 1 - 2 / (exp 2x + 1), which is right where the exponential overflows too.
                scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
            scores = tl.where(tokens[None, :] < own_stop[:, None], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            decay = tl.exp(largest - new_largest)
            powers = tl.exp(scores - new_largest[:, None])
            value_at = blocks * value_block + places * value_token + group * value_head
            values = tl.load(
                value + value_at[:, None] + value_sizes[None, :],
                mask=seen[:, None] & (value_sizes < VALUE_SIZE)[None, :],
                other=0.0,
            )  # [tile, value size]
            output = output * decay[:, None] + product(powers.to(values.dtype), values, WIDEN)
            total = total * decay + tl.sum(powers, 1)
            largest = new_largest
        place = (asking * tl.num_programs(1) * GROUP + heads) * SPLITS + split
        tl.store(weight + place, largest + tl.log(total), mask=in_group)
        tl.store(
            partial + place[:, None] * VALUE_SIZE + value_sizes[None, :],
            output / total[:, None],
            mask=in_group[:, None] & (value_sizes < VALUE_SIZE)[None, :],
        )


@triton.jit
def combine_splits(
    partial,  # [n, heads, splits, value size] float32
    weight,  # [n, heads, splits] float32
    lengths,  # [n]
    output,  # [n, heads, value size]
    window,
    VALUE_SIZE: tl.constexpr,
    VALUE_ROOM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + sequence).to(tl.int32)
    first, size = _cut(length, window, SPLITS, LEAST_SPLIT, TILE)
    splits = tl.arange(0, SPLITS)
    computed = splits < tl.cdiv(length - first, size)
    value_sizes = tl.arange(0, VALUE_ROOM)
    row = sequence * tl.num_programs(1) + head
    weights = tl.load(weight + row * SPLITS + splits, mask=computed, other=float("-inf"))
    shares = tl.exp(weights - tl.max(weights, 0))  # [splits]
    parts = tl.load(
        partial + (row * SPLITS + splits)[:, None] * VALUE_SIZE + value_sizes[None, :],
        mask=computed[:, None] & (value_sizes < VALUE_SIZE)[None, :],
        other=0.0,
    )  # [splits, value size]
    sums = tl.sum(parts * shares[:, None], 0) / tl.sum(shares, 0)
    tl.store(output + row * VALUE_SIZE + value_sizes, sums, mask=value_sizes < VALUE_SIZE)


def paged_attention(
    query: Tensor,  # [n, heads, key size]
    key: Tensor,  # [blocks, BLOCK_TOKENS, key heads, key size]
    value: Tensor,  # [blocks, BLOCK_TOKENS, key heads, value size]
    table: Tensor,  # [n, most blocks]
    lengths: Tensor,  # [n], at least 1
    scores: Scores,
    tiles: Tiles | None = None,  # None: each query by itself
) -> Tensor:  # [n, heads, value size]
    """What the last token of each sequence gets, as `plain_attention` says it slowly."""
    assert query.stride(2) == key.stride(3) == value.stride(3) == 1
    n, heads, _ = query.shape
    key_heads, value_size = value.shape[2:]
    window = scores.sliding_window or NO_WINDOW
    partial = query.new_empty(n, heads, SPLITS, value_size, dtype=torch.float32)
    weight = query.new_empty(n, heads, SPLITS, dtype=torch.float32)
    output = query.new_empty(n, heads, value_size)
    splitting, combining = constants(query, key, value, scores, tiled=tiles is not None)
    own = lengths
    if tiles is not None:  # what a window shows begins elsewhere for each query
        together = splitting["ROWS"] // splitting["GROUP_ROOM"]
        own = tiles.of(1 if scores.sliding_window else together)[:n]
    most_splits = min(SPLITS, triton.cdiv(table.shape[1] * BLOCK_TOKENS, LEAST_SPLIT))
    attend_split[(len(own), key_heads, most_splits)](
        query,
        key,
        value,
        table,
        lengths,
        own,
        partial,
        weight,
        scores.scaling,
        scores.softcap or 1.0,
        window,
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        table.stride(0),
        **splitting,
        num_warps=4,
        num_stages=2,
    )
    combine_splits[(n, heads)](partial, weight, lengths, output, window, **combining, num_warps=4)
    return output


def constants(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, *, tiled: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """What the two kernels are compiled for."""
    key_size, value_size = query.shape[2], value.shape[3]
    group = query.shape[1] // key.shape[2]
    key_room, value_room = (
        max(LEAST_ROWS, triton.next_power_of_2(size)) for size in (key_size, value_size)
    )
    rows = max(LEAST_ROWS, triton.next_power_of_2(group))
    tile = TILE_BYTES // (max(key_room, value_room) * key.element_size())
    combining = {
        "VALUE_SIZE": value_size,
        "VALUE_ROOM": value_room,
        "TILE": max(LEAST_ROWS, min(MOST_TILE, tile)),
        "SPLITS": SPLITS,
        "LEAST_SPLIT": LEAST_SPLIT,
    }
    splitting = {
        **combining,
        "KEY_SIZE": key_size,
        "KEY_ROOM": key_room,
        "GROUP": group,
        "GROUP_ROOM": triton.next_power_of_2(group) if tiled else rows,
        "TILED": tiled,
        "ROWS": rows,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "CAPPED": scores.softcap is not None,
        # The interpreter keeps bfloat16 as integers and would multiply those.
        "WIDEN": knobs.runtime.interpret and key.dtype == torch.bfloat16,
    }
    return splitting, combining

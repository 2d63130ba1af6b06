"""A Triton kernel of the digest's sums of products: each weight is read once. Import this where
Triton is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # words held at once


@triton.jit
def sum_block(
    words,  # [n] int64
    factors,  # [BLOCK] int64
    sums,  # [blocks] int64
    n,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    total = tl.zeros([TILE], tl.int64)
    for at in range(0, BLOCK, TILE):
        place = at + tl.arange(0, TILE)
        word = tl.load(words + start + place, mask=start + place < n, other=0)
        total += word * tl.load(factors + place)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def block_sums(words: Tensor, factors: Tensor) -> Tensor:  # [n], [block] -> [blocks]
    """The sum of products of each block, modulo 2^64."""
    block = len(factors)
    sums = words.new_empty(triton.cdiv(len(words), block), dtype=torch.int64)
    sum_block[(len(sums),)](words, factors, sums, len(words), BLOCK=block, TILE=TILE, num_warps=8)
    return sums

"""A digest of a row's numbers that sees every bit and costs less than the step that made them.

Each pair of floats is a 64-bit word; a block's words are multiplied by odd random numbers and
added, modulo 2^64, so that a change of one word always shows and any other with a chance of about
2^-64 not to. Integers add up the same in any order: a GPU, or more threads, give the same digest.
Measured on one thread (2026-11-29): 1.6 ms for 5 million weights, whose AdamW step takes 3.8;
torch's own product of integers 2.2, SHA-256 14.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mint_core.lora.row_layout import Floats

BLOCK = 1 << 15  # words: what is multiplied stays in a core's cache
_BETWEEN = 0x9E3779B97F4A7C15  # odd; makes the order of blocks count
_MASK = 2**64 - 1


def digest(vector: Floats) -> int:  # [numbers], contiguous -> 0 .. 2^64 - 1
    """The digest of a part of a row."""
    even = np.append(vector, np.float32(0)) if len(vector) % 2 else vector
    words = even.view(np.uint64)  # [numbers / 2], rounded up
    blocks = (words[start : start + BLOCK] for start in range(0, len(words), BLOCK))
    return combined(len(vector), (int(np.dot(block, FACTORS[: len(block)])) for block in blocks))


def combined(length: int, sums: Iterable[int]) -> int:
    """The digest of so many numbers, of the sums of products of each block, modulo 2^64."""
    total = length
    for each in sums:
        total = (total * _BETWEEN + each) & _MASK
    return total


def _factors() -> NDArray[np.uint64]:  # [BLOCK]
    """Odd numbers, the same everywhere: splitmix64's."""
    mixed = np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(_BETWEEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31)) | np.uint64(1)


FACTORS = _factors()

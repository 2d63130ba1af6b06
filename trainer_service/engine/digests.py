"""A digest of a row's weights that sees every bit and costs less than the step that made them.

Each pair of floats is a 64-bit word; a block's words are multiplied by odd random numbers and
added, modulo 2^64, so that a change of one word always shows and any other with a chance of about
2^-64 not to. Integers add up the same in any order: a GPU, or more threads, give the same digest.
Measured on one thread (2026-11-26): 2.7 ms for 5 million weights, whose AdamW step takes 4.3;
SHA-256 12.9.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from trainer_service.recovery.snapshot_files import Header, read

_BLOCK = 1 << 15  # words: what is multiplied stays in a core's cache
_BETWEEN = 0x9E3779B97F4A7C15  # odd; makes the order of blocks count
_MASK = 2**64 - 1


def digest(vector: Tensor) -> int:  # [params] float32 -> 0 .. 2^64 - 1
    """The digest of a part of a row."""
    factors = _factors(vector.device)
    words = _words(vector)
    sums = _one_by_one(words, factors) if vector.is_cpu else _on_gpu(words, factors)
    total = len(vector)
    for each in sums.tolist():  # a GPU is waited for only here
        total = (total * _BETWEEN + each) & _MASK
    return total


def damaged_parts(path: Path, header: Header) -> list[str]:
    """The vectors of a row's file that are not what was written."""
    return [
        part
        for part, vector in read(path, header).items()
        if digest(torch.from_numpy(vector)) != header.digests[part]
    ]


def _one_by_one(words: Tensor, factors: Tensor) -> Tensor:  # [n], [block] -> [blocks]
    blocks = words.split(_BLOCK)
    return torch.stack([torch.dot(block, factors[: len(block)]) for block in blocks])


def _on_gpu(words: Tensor, factors: Tensor) -> Tensor:  # [n], [block] -> [blocks]
    from trainer_service.engine.digest_kernel import block_sums  # Triton is not everywhere

    return block_sums(words, factors)


def _words(vector: Tensor) -> Tensor:  # [params] -> [params / 2], rounded up
    if len(vector) % 2:
        vector = torch.cat([vector, vector.new_zeros(1)])
    return vector.view(torch.int64)


@cache
def _factors(device: torch.device) -> Tensor:  # [block]
    """Odd numbers, the same on every device and in every version of torch."""
    drawn = []
    state = 0
    for _ in range(_BLOCK):  # splitmix64
        state = (state + _BETWEEN) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        drawn.append((mixed ^ (mixed >> 31)) | 1)
    signed = [number - 2**64 if number >> 63 else number for number in drawn]
    return torch.tensor(signed, dtype=torch.int64, device=device)

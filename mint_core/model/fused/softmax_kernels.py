"""Triton kernels of the softmax over a vocabulary. Import this where Triton is there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # logits held at once
LOWEST = -3.0e38  # finite: a logit of minus infinity has a power of 0


@triton.jit
def sum_powers(
    z,  # [n, V]
    logs,  # [n] float32, logarithms of the sums of the exponentiated
    vocabulary,
    TILE: tl.constexpr,
    LOWEST: tl.constexpr,
):
    row = z + tl.program_id(0).to(tl.int64) * vocabulary
    largest = tl.full((), LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for at in range(0, vocabulary, TILE):
        place = at + tl.arange(0, TILE)
        logits = tl.load(row + place, mask=place < vocabulary, other=float("-inf"))
        logits = logits.to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - new_largest) + tl.exp(logits - new_largest)
        largest = new_largest
    tl.store(logs + tl.program_id(0), largest + tl.log(tl.sum(total, 0)))


@triton.jit
def differentiate(
    z,  # [n, V], overwritten
    logs,  # [n] float32
    targets,  # [n, k]
    upstream,  # [n, k] float32
    vocabulary,
    k,
    TILE: tl.constexpr,
):
    which = tl.program_id(0)
    row = z + which.to(tl.int64) * vocabulary
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < vocabulary
    logits = tl.load(row + place, mask=inside, other=float("-inf")).to(tl.float32)
    shares = tl.exp(logits - tl.load(logs + which))
    gradient = tl.zeros([TILE], tl.float32)
    for target in range(k):
        slope = tl.load(upstream + which * k + target)
        asked = tl.load(targets + which * k + target)
        gradient += slope * (tl.where(place == asked, 1.0, 0.0) - shares)
    tl.store(row + place, gradient, mask=inside)


def logsums(z: Tensor) -> Tensor:  # [n, V] -> [n] float32
    """The logarithm of each row's sum of powers."""
    assert z.is_contiguous()
    sums = z.new_empty(len(z), dtype=torch.float32)
    sum_powers[(len(z),)](z, sums, z.shape[1], TILE=TILE, LOWEST=LOWEST, num_warps=8)
    return sums


def to_gradient(
    z: Tensor,  # [n, V], overwritten
    sums: Tensor,  # [n], as logsums gives them
    targets: Tensor,  # [n, k]
    upstream: Tensor,  # [n, k] float32
) -> None:
    """Turns logits into upstream * (onehot(target) - softmax), summed over a row's targets."""
    assert z.is_contiguous()
    n, vocabulary = z.shape
    differentiate[(n, triton.cdiv(vocabulary, TILE))](
        z,
        sums,
        targets.contiguous(),
        upstream.contiguous(),
        vocabulary,
        targets.shape[1],
        TILE=TILE,
        num_warps=8,
    )

"""The digest of a row's weights, against the sum written out."""

import numpy as np
import pytest
import torch

from trainer_service.engine import digests
from trainer_service.engine.digests import digest

SIZES = (1, 2, 7, 1000, 2 * digests._BLOCK, 2 * digests._BLOCK + 3)


def slow(vector: torch.Tensor) -> int:
    """The same by definition, in whole numbers of any size."""
    padded = np.concatenate([vector.numpy(), np.zeros(len(vector) % 2, np.float32)])
    words = padded.view(np.uint64).tolist()
    factors = [number % 2**64 for number in digests._factors(vector.device).tolist()]
    total = len(vector)
    for start in range(0, len(words), digests._BLOCK):
        block = words[start : start + digests._BLOCK]
        added = sum(word * factor for word, factor in zip(block, factors, strict=False))
        total = (total * digests._BETWEEN + added) % 2**64
    return total


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_sum_of_products(size: int) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(size))

    assert digest(vector) == slow(vector)


@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_adds_up_the_same(size: int) -> None:
    device = pytest.importorskip("tests.interpreted_kernels").DEVICE
    from trainer_service.engine.digest_kernel import block_sums

    words = digests._words(torch.randn(size, generator=torch.Generator().manual_seed(size)))
    factors = digests._factors(words.device)

    sums = block_sums(words.to(device), factors.to(device))
    assert torch.equal(sums.cpu(), digests._one_by_one(words, factors))


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_counts(bit: int) -> None:
    vector = torch.randn(101, generator=torch.Generator().manual_seed(0))
    before = digest(vector)

    for place in (0, 1, 50, 100):
        changed = vector.clone()
        changed.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 1 << bit
        assert digest(changed) != before


def test_order_and_length_count() -> None:
    vector = torch.randn(4 * digests._BLOCK, generator=torch.Generator().manual_seed(0))
    halves = vector.chunk(2)

    assert digest(torch.cat(halves[::-1])) != digest(vector)
    assert digest(vector[[1, 0, *range(2, 64)]]) != digest(vector[:64])
    assert digest(torch.zeros(3)) != digest(torch.zeros(4))


def test_signs_of_zero_and_kinds_of_nan_differ() -> None:
    assert digest(torch.tensor([0.0, 1.0])) != digest(torch.tensor([-0.0, 1.0]))
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert digest(quiet[:1]) != digest(quiet[1:])

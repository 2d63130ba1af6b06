"""The digest of a row's weights, against the sum written out."""

import numpy as np
import pytest

from mint_core.lora import row_digest
from mint_core.lora.row_digest import digest
from mint_core.lora.row_layout import Floats

SIZES = (1, 2, 7, 1000, 2 * row_digest.BLOCK, 2 * row_digest.BLOCK + 3)


def drawn(size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def slow(vector: Floats) -> int:
    """The same by definition, in whole numbers of any size."""
    words = np.concatenate([vector, np.zeros(len(vector) % 2, np.float32)]).view("<u8").tolist()
    factors = splitmix64(row_digest.BLOCK)
    total = len(vector)
    for start in range(0, len(words), row_digest.BLOCK):
        block = words[start : start + row_digest.BLOCK]
        added = sum(word * factor for word, factor in zip(block, factors, strict=False))
        total = (total * row_digest._BETWEEN + added) % 2**64
    return total


def splitmix64(count: int) -> list[int]:
    """Its first numbers, made odd."""
    drawn = []
    for place in range(1, count + 1):
        mixed = place * 0x9E3779B97F4A7C15 % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        drawn.append(mixed ^ (mixed >> 31) | 1)
    return drawn


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_sum_of_products(size: int) -> None:
    vector = drawn(size, size)
    assert digest(vector) == slow(vector)


@pytest.mark.parametrize("size", [size for size in SIZES if size % 2 == 0])
def test_torch_on_any_device_adds_up_the_same(size: int) -> None:
    torch = pytest.importorskip("torch")
    device = pytest.importorskip("tests.interpreted_kernels").DEVICE
    from trainer_service.engine import digests
    from trainer_service.engine.digest_kernel import block_sums

    vector = torch.from_numpy(drawn(size, size))
    assert digests.digest(vector) == digest(vector.numpy())

    sums = block_sums(vector.view(torch.int64).to(device), digests.factors(device))
    assert row_digest.combined(size, sums.tolist()) == digest(vector.numpy())


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_counts(bit: int) -> None:
    vector = drawn(101)
    before = digest(vector)

    for place in (0, 1, 50, 100):
        changed = vector.copy()
        changed.view(np.uint32)[place] ^= 1 << bit
        assert digest(changed) != before


def test_order_and_length_count() -> None:
    vector = drawn(4 * row_digest.BLOCK)
    halves = np.split(vector, 2)

    assert digest(np.concatenate(halves[::-1])) != digest(vector)
    assert digest(vector[[1, 0, *range(2, 64)]]) != digest(vector[:64])
    assert digest(np.zeros(3, np.float32)) != digest(np.zeros(4, np.float32))


def test_signs_of_zero_and_kinds_of_nan_differ() -> None:
    assert digest(np.float32([0.0, 1.0])) != digest(np.float32([-0.0, 1.0]))
    quiet = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert digest(quiet[:1]) != digest(quiet[1:])


def test_where_a_vector_lies_does_not_count() -> None:
    """In a file it may begin at any number."""
    vector = drawn(3 * row_digest.BLOCK)
    assert digest(vector[1:]) == digest(vector[1:].copy())

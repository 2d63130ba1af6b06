"""Randomness that depends on nothing but a counter: (seed, sample, position)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sampler_service.engine.drawing.penalties import Occurrences
from sampler_service.jobs import Choice


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row's token is drawn by."""

    choice: Choice
    sample: int  # index of the sample in its request
    position: int  # of the token in its continuation
    occurrences: Occurrences | None = None  # for penalties; None: there are none
    allowed: NDArray[np.bool_] | None = None  # [V], at least one; None: all
    topk: int = 0  # how many of the likeliest tokens to report

    @property
    def bends(self) -> bool:
        """Whether its token comes from other logits than the model's."""
        return self.occurrences is not None or self.allowed is not None


def uniforms(draws: Sequence[Draw]) -> NDArray[np.float64]:  # [n], each in (0, 1)
    """Numbers that depend on (seed, sample, position) alone, evenly spread, 52 bits each."""
    seeds = np.array([d.choice.seed & _ALL for d in draws], np.uint64)
    positions = np.array([d.position for d in draws], np.uint64)
    samples = np.array([d.sample for d in draws], np.uint64)
    return _uniform(seeds, samples, positions, np.zeros_like(seeds))


def alternative_uniforms(seed: int, positions: range, k: int) -> NDArray[np.float64]:
    """Numbers for k tokens in place of each of a prompt's, [positions, k]. No sample has them."""
    places, numbers = np.meshgrid(
        np.array(positions, np.uint64), np.arange(k, dtype=np.uint64), indexing="ij"
    )
    ones = np.ones_like(places)
    return _uniform(ones * np.uint64(seed & _ALL), numbers, places, ones)


def _uniform(
    seeds: "Words", samples: "Words", positions: "Words", kinds: "Words"
) -> NDArray[np.float64]:
    """Of the arrays' shape."""
    counter = (positions, samples, kinds, np.zeros_like(seeds))
    high, low, _, _ = philox(counter, (seeds & _MASK, seeds >> _SHIFT))
    bits = (high << np.uint64(20)) | (low >> np.uint64(12))
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


_ALL = 0xFFFFFFFFFFFFFFFF
_MASK, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
Words = NDArray[np.uint64]  # holding 32 bits each


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (right >> _SHIFT) ^ c1 ^ k0, right & _MASK
        c2, c3 = (left >> _SHIFT) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK, (k1 + np.uint64(0xBB67AE85)) & _MASK
    return c0, c1, c2, c3

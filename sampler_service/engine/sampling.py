"""Draws tokens: temperature, top-k, top-p, and randomness that depends on nothing but a counter.

n: rows. V: vocabulary size. Rows are computed one beside the other and never mixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_service.jobs import Choice

CHUNK_BYTES = 64 * 1024**2  # of float64 probabilities


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row's token is drawn by."""

    choice: Choice
    sample: int  # index of the sample in its request
    position: int  # of the token in its continuation


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """All are [n], in the order of the rows."""

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]  # at the row's temperature, at 1 where that is 0
    model_logprobs: NDArray[np.float32]  # at temperature 1
    finite: NDArray[np.bool_]  # whether the row's logits are; if not, its other values mean nothing


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> DrawnTokens:  # logits [n, V] float32
    """One token for each row."""
    rows = max(1, CHUNK_BYTES // (8 * logits.shape[1]))
    parts = [
        _draw_chunk(logits[at : at + rows], draws[at : at + rows])
        for at in range(0, len(draws), rows)
    ]
    return DrawnTokens(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _draw_chunk(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = logits.device
    finite = logits.isfinite().all(1)
    logits = torch.where(finite[:, None], logits, 0.0)
    temperature = torch.tensor([d.choice.temperature for d in draws], device=device)  # [n] float32
    warm = torch.tensor([i for i, d in enumerate(draws) if d.choice.temperature > 0], device=device)
    tokens = logits.argmax(1)
    # Less the largest, so that no temperature makes an infinity out of a finite logit.
    shifted = logits - logits.amax(1, keepdim=True)
    divided = shifted / torch.where(temperature > 0, temperature, 1.0)[:, None]
    if len(warm):
        wanted = [draws[i] for i in warm.tolist()]
        tokens[warm] = _invert(_probabilities(divided[warm], wanted), uniforms(wanted))
    model_logprobs = _logprobs(shifted, tokens)
    # Divided by 1 they are the same number; so they are the same bits.
    logprobs = torch.where(temperature == 1, model_logprobs, _logprobs(divided, tokens))
    return tokens, logprobs, model_logprobs, finite


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:  # [n]
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)


def _probabilities(logits: Tensor, draws: Sequence[Draw]) -> Tensor:  # [n, V] float64
    """What each row draws from, up to a factor: top-k first, then top-p of what is left."""
    probabilities = logits.double().exp()
    narrowed = [
        i for i, d in enumerate(draws) if 0 < d.choice.top_k < logits.shape[1] or d.choice.top_p < 1
    ]
    if narrowed:
        rows = torch.tensor(narrowed, device=logits.device)
        probabilities[rows] = _narrow(probabilities[rows], [draws[i].choice for i in narrowed])
    return probabilities


def _narrow(probabilities: Tensor, choices: Sequence[Choice]) -> Tensor:  # [n, V]
    """Sets to 0 what top-k and top-p leave out. Of equal tokens the smaller id stays."""
    n, vocabulary = probabilities.shape
    device = probabilities.device
    top_k = torch.tensor([c.top_k if c.top_k > 0 else vocabulary for c in choices], device=device)
    top_p = torch.tensor([c.top_p for c in choices], dtype=torch.float64, device=device)
    ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
    ranked[torch.arange(vocabulary, device=device) >= top_k[:, None]] = 0
    before = ranked.cumsum(1) - ranked
    # A token stays while those before it do not reach top-p; with top-p 1 all stay, however sums
    # round.
    reached = (before >= top_p[:, None] * ranked.sum(1, keepdim=True)) & (top_p[:, None] < 1)
    ranked[reached] = 0
    return torch.zeros(n, vocabulary, dtype=torch.float64, device=device).scatter_(1, order, ranked)


def _invert(probabilities: Tensor, uniform: NDArray[np.float64]) -> Tensor:  # [n] tokens
    """The first token at which the cumulated probability exceeds the draw."""
    cumulated = probabilities.cumsum(1)
    total = cumulated[:, -1:]
    threshold = torch.from_numpy(uniform).to(total.device)[:, None] * total
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulated, torch.minimum(threshold, below_total), right=True)[:, 0]


def uniforms(draws: Sequence[Draw]) -> NDArray[np.float64]:  # [n], each in (0, 1)
    """Numbers that depend on (seed, sample, position) alone, evenly spread, 52 bits each."""
    seeds = np.array([d.choice.seed & 0xFFFFFFFFFFFFFFFF for d in draws], np.uint64)
    positions = np.array([d.position for d in draws], np.uint64)
    samples = np.array([d.sample for d in draws], np.uint64)
    zeros = np.zeros_like(seeds)
    high, low, _, _ = philox((positions, samples, zeros, zeros), (seeds & _MASK, seeds >> _SHIFT))
    bits = (high << np.uint64(20)) | (low >> np.uint64(12))
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


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

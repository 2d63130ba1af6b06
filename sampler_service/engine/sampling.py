"""Draws tokens from logits, and says how likely they were.

n: rows. V: vocabulary size. Rows are computed one beside the other and never mixed. A token is
found by inverting the cumulated probability: in the order of token ids or, where top-k or top-p
leave tokens out (narrowing.py), from the likeliest on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_service.engine.narrowing import draw_narrowed, first_above, narrows
from sampler_service.engine.randomness import Draw, uniforms

CHUNK_BYTES = 64 * 1024**2  # of float32 powers
# A token is looked for among the sums of so many neighbours first: that spares a running sum over
# the vocabulary, in which each addition waits for the one before.
STRETCH = 256


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """All are [n], in the order of the rows."""

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]  # at the row's temperature, at 1 where that is 0
    model_logprobs: NDArray[np.float32]  # at temperature 1
    finite: NDArray[np.bool_]  # whether the row's logits are; if not, its other values mean nothing


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> DrawnTokens:  # logits [n, V] float32
    """One token for each row."""
    rows = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    parts = [
        _draw_chunk(logits[at : at + rows], draws[at : at + rows])
        for at in range(0, len(draws), rows)
    ]
    return DrawnTokens(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _draw_chunk(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    least, largest = logits.aminmax(dim=1)
    finite = least.isfinite() & largest.isfinite()  # a NaN anywhere is both
    if not finite.all():
        logits = torch.where(finite[:, None], logits, 0.0)
        largest = torch.where(finite, largest, 0.0)
    at_one = _Distribution(logits, largest, None)
    own = at_one
    if any(draw.choice.temperature not in (0, 1) for draw in draws):
        temperatures = [draw.choice.temperature or 1.0 for draw in draws]
        own = _Distribution(logits, largest, torch.tensor(temperatures, device=logits.device))
    uniform = torch.from_numpy(uniforms(draws)).to(logits.device)
    tokens = own.invert(uniform)
    warm = [draw.choice.temperature > 0 for draw in draws]
    narrowed = [i for i, d in enumerate(draws) if warm[i] and narrows(d.choice, logits.shape[1])]
    if narrowed:
        rows = torch.tensor(narrowed, device=logits.device)
        choices = [draws[i].choice for i in narrowed]
        tokens[rows] = draw_narrowed(own.scores(rows), own.total[rows], choices, uniform[rows])
    if cold := [i for i, is_warm in enumerate(warm) if not is_warm]:
        rows = torch.tensor(cold, device=logits.device)
        tokens[rows] = logits[rows].argmax(1)
    return tokens, own.logprobs(tokens), at_one.logprobs(tokens), finite


class _Distribution:
    """softmax(logits / temperature), as exp(score) / total with scores of at most 0."""

    def __init__(self, logits: Tensor, largest: Tensor, temperatures: Tensor | None) -> None:
        """`temperatures` [n]; None: 1 everywhere."""
        self._logits = logits
        self._largest = largest
        self._temperatures = temperatures
        n, vocabulary = logits.shape
        filled = logits.new_zeros(n, -(-vocabulary // STRETCH) * STRETCH)
        powers = torch.sub(logits, largest[:, None], out=filled[:, :vocabulary])
        if temperatures is not None:
            powers /= temperatures[:, None]
        powers.exp_()
        self._stretches = filled.view(n, -1, STRETCH)
        self._cumulated = self._stretches.sum(2).double().cumsum(1)  # [n, stretches]
        self.total = self._cumulated[:, -1]  # [n] float64

    def scores(self, rows: Tensor) -> Tensor:  # [rows, V]
        scores = self._logits[rows] - self._largest[rows, None]
        return scores if self._temperatures is None else scores / self._temperatures[rows, None]

    def logprobs(self, tokens: Tensor) -> Tensor:  # [n] float32
        """The logarithm of each row's probability of its token."""
        scores = self._logits.gather(1, tokens[:, None])[:, 0] - self._largest
        if self._temperatures is not None:
            scores = scores / self._temperatures
        return scores - self.total.log().float()

    def invert(self, uniform: Tensor) -> Tensor:  # [n] float64 -> [n] tokens
        """The first token of each row at which the cumulated probability exceeds the draw."""
        threshold = (uniform * self.total)[:, None]
        stretch = first_above(self._cumulated, threshold)
        before = self._cumulated.gather(1, (stretch - 1).clamp(min=0))
        rest = threshold - torch.where(stretch > 0, before, 0.0)
        at = torch.arange(len(uniform), device=uniform.device)
        powers = self._stretches[at, stretch[:, 0]].double().cumsum(1)
        return (stretch * STRETCH + first_above(powers, rest))[:, 0]

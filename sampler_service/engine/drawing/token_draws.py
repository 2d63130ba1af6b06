"""Draws tokens from logits, and says how likely they were.

n: rows. V: vocabulary size. Rows are computed one beside the other and never mixed. A token is
found by inverting the cumulated probability: in the order of token ids or, where top-k, top-p or
min-p leave tokens out (narrowing.py), from the likeliest on. Where penalties or a constraint apply,
it is drawn from logits changed by them; what is reported is always of the model's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sampler_service.engine.drawing.narrowing import draw_narrowed, first_above, narrows
from sampler_service.engine.drawing.penalties import penalize
from sampler_service.engine.drawing.randomness import Draw, uniforms
from sampler_service.engine.drawing.sums import PLAIN, Sums

# Likeliest tokens that are looked for, however few are wanted: ties fall alike then. The contract's
# limit, which requests are held to.
TOPK = 64
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
    # Whether the row's logits and both logprobs are; if not, its other values mean nothing.
    finite: NDArray[np.bool_]
    top_ids: NDArray[np.int64]  # [n, TOPK], likeliest first, of rows that want them; [n, 0] if none
    top_logprobs: NDArray[np.float32]  # of the same shape, at temperature 1


def draw_tokens(
    logits: Tensor,  # [n, V] float32
    draws: Sequence[Draw],
    sums: Sums = PLAIN,
) -> DrawnTokens:
    """One token for each row."""
    rows = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    topk = min(TOPK, logits.shape[1]) if any(draw.topk for draw in draws) else 0
    parts = [
        _draw_chunk(logits[at : at + rows], draws[at : at + rows], topk, sums)
        for at in range(0, len(draws), rows)
    ]
    return DrawnTokens(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def draw_alternatives(logits: Tensor, uniform: Tensor, sums: Sums = PLAIN) -> tuple[Tensor, Tensor]:
    """Tokens drawn at temperature 1 by each of `uniform` [n, k], independently, and their logprobs,
    both [n, k]. `logits` [n, V] are finite, or their row means nothing.
    """
    logits = logits.nan_to_num()
    whole = _Distribution(logits, logits.amax(1), None, sums)
    tokens = torch.stack([whole.invert(column) for column in uniform.unbind(1)], 1)
    return tokens, whole.logprobs(tokens)


def draw_plain(
    logits: Tensor,  # [n, V] float32
    temperatures: Tensor,  # [n], not 0
    cold: Tensor,  # [n] bool, whether the likeliest token is drawn
    uniform: Tensor,  # [n] float64
    sums: Sums = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, both logprobs, and whether they are finite, of rows that nothing narrows or bends: as
    `draw_tokens`, but nothing is read on the host.
    """
    least, largest = logits.aminmax(dim=1)
    finite = least.isfinite() & largest.isfinite()
    logits = torch.where(finite[:, None], logits, 0.0)
    largest = torch.where(finite, largest, 0.0)
    at_one = _Distribution(logits, largest, None, sums)
    own = _Distribution(logits, largest, temperatures, sums)
    tokens = torch.where(cold, logits.argmax(1), own.invert(uniform))
    logprobs, model_logprobs = (d.logprobs(tokens[:, None])[:, 0] for d in (own, at_one))
    finite &= logprobs.isfinite() & model_logprobs.isfinite()
    return tokens, logprobs, model_logprobs, finite


def _draw_chunk(logits: Tensor, draws: Sequence[Draw], topk: int, sums: Sums) -> tuple[Tensor, ...]:
    least, largest = logits.aminmax(dim=1)
    finite = least.isfinite() & largest.isfinite()  # a NaN anywhere is both
    if not finite.all():
        logits = torch.where(finite[:, None], logits, 0.0)
        largest = torch.where(finite, largest, 0.0)
    at_one = _Distribution(logits, largest, None, sums)
    own = _at_temperatures(at_one, draws)
    uniform = torch.from_numpy(uniforms(draws)).to(logits.device)
    tokens = _choose(own, draws, uniform)
    if bent := [i for i, draw in enumerate(draws) if draw.bends]:
        rows = torch.tensor(bent, device=logits.device)
        theirs = [draws[i] for i in bent]
        bent_logits = _bend(logits[rows], theirs)
        bent_at_one = _Distribution(bent_logits, bent_logits.amax(1), None, sums)
        tokens[rows] = _choose(_at_temperatures(bent_at_one, theirs), theirs, uniform[rows])
    logprobs, model_logprobs = (d.logprobs(tokens[:, None])[:, 0] for d in (own, at_one))
    # Of logits too far apart for float32, what a constraint leaves may have none.
    finite &= logprobs.isfinite() & model_logprobs.isfinite()
    return tokens, logprobs, model_logprobs, finite, *_likeliest(at_one, draws, topk)


def _bend(logits: Tensor, draws: Sequence[Draw]) -> Tensor:  # [n, V] -> [n, V]
    """What penalties and constraints make of logits, which are overwritten."""
    occurrences = {i: d.occurrences for i, d in enumerate(draws) if d.occurrences is not None}
    if occurrences:
        choices = [draws[i].choice for i in occurrences]
        penalize(logits, list(occurrences), choices, list(occurrences.values()))
    allowed = {i: d.allowed for i, d in enumerate(draws) if d.allowed is not None}
    if allowed:
        rows = torch.tensor(list(allowed), device=logits.device)
        ruled_out = ~torch.from_numpy(np.stack(list(allowed.values()))).to(logits.device)
        logits[rows] = logits[rows].masked_fill_(ruled_out, -torch.inf)
    return logits


def _at_temperatures(at_one: "_Distribution", draws: Sequence[Draw]) -> "_Distribution":
    """The distribution that each row is drawn from, but for what narrows it; at 0 that at 1."""
    if all(draw.choice.temperature in (0, 1) for draw in draws):
        return at_one
    temperatures = [draw.choice.temperature or 1.0 for draw in draws]
    temperature = torch.tensor(temperatures, device=at_one.logits.device)
    return _Distribution(at_one.logits, at_one.largest, temperature, at_one.sums)


def _choose(own: "_Distribution", draws: Sequence[Draw], uniform: Tensor) -> Tensor:  # [n]
    """A token for each row."""
    logits = own.logits
    tokens = own.invert(uniform)
    warm = [draw.choice.temperature > 0 for draw in draws]
    narrowed = [i for i, d in enumerate(draws) if warm[i] and narrows(d.choice, logits.shape[1])]
    if narrowed:
        rows = torch.tensor(narrowed, device=logits.device)
        choices = [draws[i].choice for i in narrowed]
        scores, totals = own.scores(rows), own.total[rows]
        tokens[rows] = draw_narrowed(scores, totals, choices, uniform[rows], sums=own.sums)
    if cold := [i for i, is_warm in enumerate(warm) if not is_warm]:
        rows = torch.tensor(cold, device=logits.device)
        tokens[rows] = logits[rows].argmax(1)
    return tokens


def _likeliest(at_one: "_Distribution", draws: Sequence[Draw], topk: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of rows that want them, and their logprobs, both [n, topk]."""
    ids = torch.zeros(len(draws), topk, dtype=torch.int64, device=at_one.logits.device)
    if wanting := [i for i, draw in enumerate(draws) if draw.topk]:
        rows = torch.tensor(wanting, device=ids.device)
        _, ids[rows] = at_one.sums.ranked(at_one.logits[rows], topk)
    return ids, at_one.logprobs(ids)


class _Distribution:
    """softmax(logits / temperature), as exp(score) / total with scores of at most 0."""

    def __init__(
        self, logits: Tensor, largest: Tensor, temperatures: Tensor | None, sums: Sums
    ) -> None:
        """`temperatures` [n]; None: 1 everywhere."""
        self.logits = logits
        self.largest = largest
        self.sums = sums
        self._temperatures = temperatures
        n, vocabulary = logits.shape
        filled = logits.new_zeros(n, -(-vocabulary // STRETCH) * STRETCH)
        powers = torch.sub(logits, largest[:, None], out=filled[:, :vocabulary])
        if temperatures is not None:
            powers /= temperatures[:, None]
        powers.exp_()
        self._stretches = filled.view(n, -1, STRETCH)
        self._cumulated = sums.running_stretches(self._stretches)  # [n, stretches]
        self.total = self._cumulated[:, -1]  # [n] float64

    def scores(self, rows: Tensor) -> Tensor:  # [rows, V]
        scores = self.logits[rows] - self.largest[rows, None]
        return scores if self._temperatures is None else scores / self._temperatures[rows, None]

    def logprobs(self, tokens: Tensor) -> Tensor:  # [n, any] -> [n, any] float32
        """The logarithms of each row's probabilities of its tokens."""
        scores = self.logits.gather(1, tokens) - self.largest[:, None]
        if self._temperatures is not None:
            scores = scores / self._temperatures[:, None]
        return scores - self.total.log().float()[:, None]

    def invert(self, uniform: Tensor) -> Tensor:  # [n] float64 -> [n] tokens
        """The first token of each row at which the cumulated probability exceeds the draw."""
        threshold = (uniform * self.total)[:, None]
        stretch = first_above(self._cumulated, threshold)
        before = self._cumulated.gather(1, (stretch - 1).clamp(min=0))
        rest = threshold - torch.where(stretch > 0, before, 0.0)
        at = torch.arange(len(uniform), device=uniform.device)
        powers = self.sums.running(self._stretches[at, stretch[:, 0]])
        return (stretch * STRETCH + first_above(powers, rest))[:, 0]

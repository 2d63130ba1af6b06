"""Draws from what top-k, top-p and min-p leave of a distribution: top-k first, then top-p of what
is left, and of that the tokens that are likely enough beside the likeliest (min-p: Nguyen et al.
2024, "Turning up the heat").

Tokens are ranked from the likeliest on, of equal ones the smaller id first. Mostly the first few
dozens settle a row; where they do not, more ranks are asked for, and at last all of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sampler_service.engine.drawing.sums import PLAIN, Sums
from sampler_service.jobs import Choice

FIRST_RANKS = (64, 1024, 8192)


def narrows(choice: Choice, vocabulary_size: int) -> bool:
    """Whether a choice leaves tokens out."""
    return 0 < choice.top_k < vocabulary_size or choice.top_p < 1 or choice.min_p > 0


def draw_narrowed(
    scores: Tensor,  # [n, V], logarithms of probabilities beside the likeliest one's: at most 0
    totals: Tensor,  # [n] float64, the sums of exp(score)
    choices: Sequence[Choice],
    uniform: Tensor,  # [n] float64 in (0, 1)
    first_ranks: Sequence[int] = FIRST_RANKS,
    sums: Sums = PLAIN,
) -> Tensor:  # [n] tokens
    """One token for each row."""
    n, vocabulary = scores.shape
    device = scores.device
    top_k = torch.tensor([c.top_k if c.top_k > 0 else vocabulary for c in choices], device=device)
    top_p = torch.tensor([c.top_p for c in choices], dtype=torch.float64, device=device)
    floor = torch.tensor([_floor(c.min_p) for c in choices], device=device)
    tokens = torch.empty(n, dtype=torch.int64, device=device)
    left = torch.arange(n, device=device)
    for ranks in [*(r for r in first_ranks if r < vocabulary), vocabulary]:
        values, ids = sums.ranked(scores[left], ranks)
        # Of what top-k leaves: all of it, or what the ranks at hand will tell, or not known yet.
        whole = torch.where(top_k[left] < vocabulary, torch.inf, totals[left])
        kept = _kept(values, whole, top_k[left], top_p[left], sums)
        # A floor tells how many stay unless top-p has yet to: it may leave fewer.
        open_ended = (top_k[left] > ranks) & (top_k[left] < vocabulary) & (top_p[left] < 1)
        likely = (values >= floor[left, None]).sum(1)
        kept = torch.where(open_ended, kept, torch.minimum(kept, likely))
        # Equal scores at the last rank may go on beyond it, and their order is then not known.
        last_kept = values.gather(1, kept[:, None] - 1)[:, 0]
        settled = last_kept > values[:, -1]
        if ranks == vocabulary:
            settled = torch.ones_like(settled)
        done = left[settled]
        tokens[done] = _draw(values[settled], ids[settled], kept[settled], uniform[done], sums)
        left = left[~settled]
        if not len(left):
            break
    return tokens


def _floor(min_p: float) -> float:
    """The least score that stays. Tokens that are ruled out, whose score is -inf, never do."""
    return math.log(min_p) if min_p > 0 else torch.finfo(torch.float32).min


def _kept(
    values: Tensor, whole: Tensor, top_k: Tensor, top_p: Tensor, sums: Sums
) -> Tensor:  # [n], from 1
    """How many ranks stay; all of them where more might."""
    ranks = values.shape[1]
    rank = torch.arange(ranks, device=values.device)
    cumulated = sums.running(torch.where(rank < top_k[:, None], values.double().exp(), 0.0))
    whole = torch.where(top_k <= ranks, cumulated[:, -1], whole)
    before = cumulated.roll(1, 1)
    before[:, 0] = 0
    # A token stays while those before it do not reach top-p; with top-p 1 all stay, however sums
    # round.
    reached = (before >= (top_p * whole)[:, None]) & (top_p < 1)[:, None]
    stays = ~reached & (rank < top_k[:, None])
    return stays.sum(1).clamp(min=1)


def _draw(
    values: Tensor, ids: Tensor, kept: Tensor, uniform: Tensor, sums: Sums
) -> Tensor:  # [n] tokens
    rank = torch.arange(values.shape[1], device=values.device)
    cumulated = sums.running(torch.where(rank < kept[:, None], values.double().exp(), 0.0))
    return ids.gather(1, first_above(cumulated, uniform[:, None] * cumulated[:, -1:]))[:, 0]


def first_above(cumulated: Tensor, threshold: Tensor) -> Tensor:  # [n, many], [n, 1] -> [n, 1]
    """The first place whose cumulated sum exceeds the threshold, which rounding may have taken to
    the whole sum or beyond: then the last that adds to it.
    """
    total = cumulated[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulated, torch.minimum(threshold, below_total), right=True)

"""A causal convolution of each channel by itself, over the runs of a stream.

T: rows of the stream. d: channels. k: taps, of which the last is the row's own.
"""

from typing import Any

import torch
from torch import Tensor

from mint_core.model.mixers.runs import Margins, Runs


def convolved(
    x: Tensor,  # [T, d]
    taps: Tensor,  # [k, d]
    runs: Runs,
    before: Tensor | None,  # [D, k - 1, d], what came before each run; None: zeros
) -> tuple[Tensor, Tensor | None]:  # [T, d], and what comes before the rows that follow
    """Each row's own run alone counts."""
    margins = runs.margins(len(taps) - 1)
    if torch.is_grad_enabled() and x.requires_grad:
        assert before is None, "gradients do not reach back beyond the pass"
        return _Convolution.apply(x, taps, margins), None  # type: ignore[no-untyped-call]
    wide = _laid_out(x, margins, margins.places)
    last = None
    if before is not None:
        wide.index_copy_(0, margins.before, before.flatten(0, 1))
        last = wide.index_select(0, margins.last).view_as(before)
    return _slid(wide, taps, margins), last


def convolved_step(
    x: Tensor,  # [n, d]
    taps: Tensor,  # [k, d]
    before: Tensor,  # [n, k - 1, d]
) -> tuple[Tensor, Tensor]:  # [n, d], [n, k - 1, d]
    """The same of one row of each sequence."""
    window = torch.cat([before, x[:, None]], dim=1)
    y = window[:, 0] * taps[0]
    for place in range(1, len(taps)):
        y.addcmul_(window[:, place], taps[place])
    return y, window[:, 1:]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, margins: Margins) -> Tensor:
        ctx.taps, ctx.margins = taps, margins
        return _slid(_laid_out(x, margins, margins.places), taps, margins)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """A row has a part in those that follow it: the same with margins behind, taps reversed."""
        margins = ctx.margins
        wide = _laid_out(gradients[0], margins, margins.places - margins.width)
        return _slid(wide, ctx.taps.flip(0), margins), None, None


def _laid_out(x: Tensor, margins: Margins, places: Tensor) -> Tensor:  # [T, d] -> [P, d]
    wide = x.new_zeros(margins.count, x.shape[1])
    rows = x if margins.covered is None else x.index_select(0, margins.covered)
    return wide.index_copy_(0, places, rows)


def _slid(wide: Tensor, taps: Tensor, margins: Margins) -> Tensor:  # [P, d] -> [T, d]
    count = margins.count - margins.width
    y = wide[:count] * taps[0]
    for place in range(1, len(taps)):
        y.addcmul_(wide[place : place + count], taps[place])
    return y.index_select(0, margins.first)

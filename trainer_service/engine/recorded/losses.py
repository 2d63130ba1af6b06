"""The losses of all tokens of a pass at once, each of its own kind, in operations that are the same
whatever the kinds are. `trainer_service/engine/losses.py` says the losses one by one: the oracle.

T: tokens of the pass, what fills it up included.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mint_core.lora.spec import within_float32
from trainer_service.engine.losses import LARGEST_LOG_RATIO, LossInputs
from trainer_service.engine.packing import PackedTile
from trainer_service.jobs import Cispo, CrossEntropy, Dro, Gspo, ImportanceSampling, Loss, Ppo


class Kind(IntEnum):
    """Of a token's loss; places in what `LossTable.differentiate` stacks."""

    CROSS_ENTROPY, RATIO, CLIPPED, CISPO, DRO, GSPO = range(6)


_KINDS = {
    CrossEntropy: Kind.CROSS_ENTROPY,
    ImportanceSampling: Kind.RATIO,
    Ppo: Kind.CLIPPED,
    Cispo: Kind.CISPO,
    Dro: Kind.DRO,
    Gspo: Kind.GSPO,
}
# Of a token: weight, sampled logprob, advantage, clips, beta of Dro, whether it counts in its
# sequence's ratio, whether its tile goes backward.
NUMBERS = 8


def take(tile: PackedTile, kinds: NDArray[np.int64], numbers: NDArray[np.float32]) -> None:
    """Notes a tile's losses in [T] and [NUMBERS, T], both 0 before."""
    rows = slice(tile.segment.start, tile.segment.start + len(tile.targets))
    own = numbers[:, rows]
    kinds[rows] = note(tile.tile.loss, tile.inputs, own)
    if tile.ratio_mask is not None:
        own[6] = tile.ratio_mask.numpy()
    own[7] = tile.tile.backward


def note(loss: Loss, inputs: LossInputs, own: NDArray[np.float32]) -> Kind:
    """Writes what a loss reads, of tokens [NUMBERS, tokens], and says which it is."""
    if isinstance(loss, Ppo | Cispo | Gspo):
        own[3] = within_float32(loss.clip_low_threshold)
        own[4] = within_float32(loss.clip_high_threshold)
    if isinstance(loss, Dro):
        own[5] = within_float32(loss.beta)
    given = (inputs.weights, inputs.logprobs, inputs.advantages, inputs.clip_low, inputs.clip_high)
    for place, values in enumerate(given):
        if values is not None:
            own[place] = values.numpy()
    return _KINDS[type(loss)]


@dataclass(frozen=True, slots=True)
class LossTable:
    """What the losses of a pass read."""

    kinds: Tensor  # [T] Kind
    numbers: Tensor  # [NUMBERS, T] float32
    owners: Tensor  # [T] whose document it is
    bounds: Tensor  # [documents + 1] of the documents

    @torch.no_grad()
    def differentiate(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:  # all [T] float32
        """Each token's loss and its derivative with respect to that token's logprob, 0 where its
        tile does not go backward. In float64: a ratio that overflows may be clipped away.
        """
        weights, sampled, advantages, low, high, beta, mask, trains = self.numbers.double()
        own = logprobs.double()
        log_ratio = own - sampled
        whole = self._of_sequences(torch.where(mask > 0, log_ratio, 0.0), mask)
        log_ratio = torch.where(self.kinds == Kind.GSPO, whole, log_ratio)
        ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
        clipped = torch.minimum(torch.maximum(ratio, low), high)
        gain, clipped_gain = ratio * advantages, clipped * advantages
        pessimistic = torch.minimum(gain, clipped_gain)
        rising = torch.where(gain <= clipped_gain, gain, 0.0)  # its derivative
        squared, linear = 0.5 * beta * log_ratio.square(), own * advantages
        losses = (own, gain, pessimistic, clipped * linear, linear - squared, pessimistic)
        ones = torch.ones_like(own)
        slopes = (ones, gain, rising, clipped_gain, advantages - beta * log_ratio, rising)
        skipped = weights == 0  # it contributes exactly nothing, also where it is not finite
        loss, slope = (
            torch.stack(each).gather(0, self.kinds[None])[0].mul(-weights).masked_fill(skipped, 0.0)
            for each in (losses, slopes)
        )
        return loss.float(), slope.masked_fill(trains == 0, 0.0).float()

    def _of_sequences(self, log_ratio: Tensor, mask: Tensor) -> Tensor:  # [T]
        """The mean of the log ratios of each token's document where the mask is 1."""
        # By differences of running sums, in which what is not finite would reach others' documents.
        broken = ~log_ratio.isfinite()
        rows = torch.stack([log_ratio.masked_fill(broken, 0.0), mask, broken.double()])
        sums = torch.nn.functional.pad(rows.cumsum(1), (1, 0))
        bounds = self.bounds.long()
        total, count, bad = sums[:, bounds[1:]] - sums[:, bounds[:-1]]  # [documents]
        mean: Tensor = (total / count.clamp(min=1.0)).masked_fill(bad > 0, torch.nan)
        return mean[self.owners]

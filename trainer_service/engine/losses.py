"""Losses as pure functions of target logprobs. Sums, never means; formulas in
proto/mintrpc/v1/types.proto and docs/losses.md.

`tokens` counts the targets of a tile, its documents one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trainer_service.jobs import Cispo, CrossEntropy, Dro, Gspo, ImportanceSampling, Loss, Ppo


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What losses read beside the logprobs; each is [tokens] float32."""

    weights: Tensor  # [tokens, k] where k targets stand at each position
    logprobs: Tensor | None = None  # under the policy that sampled
    advantages: Tensor | None = None
    clip_low: Tensor | None = None  # instead of the loss's own
    clip_high: Tensor | None = None
    sequence_ratios: Tensor | None = None  # of the sequence to which each token belongs

    def at(self, places: Tensor | slice) -> "LossInputs":
        """The inputs of some of the tokens."""
        chosen: dict[str, Any] = {
            entry.name: None if value is None else value[places]
            for entry in fields(self)
            for value in [getattr(self, entry.name)]
        }
        return LossInputs(**chosen)


def _unweighted(
    loss: ImportanceSampling | Ppo | Cispo | Dro | Gspo, logprobs: Tensor, inputs: LossInputs
) -> Tensor:  # [tokens]
    """The loss of each token. Differentiable with respect to `logprobs`."""
    assert inputs.logprobs is not None
    assert inputs.advantages is not None
    advantages = inputs.advantages
    log_ratio = logprobs - inputs.logprobs
    match loss:
        case ImportanceSampling():
            return -log_ratio.exp() * advantages
        case Ppo():
            return -_pessimistic(loss, log_ratio.exp(), inputs)
        case Cispo():
            return -_clipped(loss, log_ratio.exp(), inputs).detach() * logprobs * advantages
        case Dro(beta):
            return -(logprobs * advantages - 0.5 * beta * log_ratio.square())
        case Gspo():
            assert inputs.sequence_ratios is not None
            own = (logprobs - logprobs.detach()).exp()  # 1, with the gradient of the logprob
            return -_pessimistic(loss, inputs.sequence_ratios * own, inputs)


def _pessimistic(loss: Ppo | Gspo, ratio: Tensor, inputs: LossInputs) -> Tensor:  # [tokens]
    assert inputs.advantages is not None
    clipped = _clipped(loss, ratio, inputs)
    return torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)


def _clipped(loss: Ppo | Cispo | Gspo, ratio: Tensor, inputs: LossInputs) -> Tensor:  # [tokens]
    low, high = loss.clip_low_threshold, loss.clip_high_threshold
    if inputs.clip_low is None and inputs.clip_high is None:
        return ratio.clamp(low, high)
    return ratio.clamp(
        torch.full_like(ratio, low) if inputs.clip_low is None else inputs.clip_low,
        torch.full_like(ratio, high) if inputs.clip_high is None else inputs.clip_high,
    )


def sequence_ratios(
    log_ratio: Tensor,  # [tokens]; read where the mask is 1
    mask: Tensor,  # [tokens], 0 or 1
    lengths: Sequence[int],  # of the documents
) -> Tensor:  # [tokens]
    """The ratio of the sequence to which each token belongs: exp(mean of its log ratios). 1 where
    a document has no token in its sequence.
    """
    ratios = []
    for values, chosen in zip(
        log_ratio.split(list(lengths)), mask.bool().split(list(lengths)), strict=True
    ):
        mean = values[chosen].mean() if chosen.any() else values.new_zeros(())
        ratios.append(mean.exp().expand(len(values)))
    return torch.cat(ratios)


def differentiate(
    loss: Loss, logprobs: Tensor, inputs: LossInputs
) -> tuple[Tensor, Tensor]:  # both as `logprobs`
    """Each token's loss and its derivative with respect to that token's logprob."""
    if isinstance(loss, CrossEntropy):  # what most tiles ask for: a graph would cost more than it
        losses, slopes = -inputs.weights * logprobs, -inputs.weights
    else:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            losses = inputs.weights * _unweighted(loss, leaf, inputs)
            (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    # A weight of 0 contributes exactly nothing, also where ratio or logprob is not finite.
    skipped = inputs.weights == 0
    return losses.detach().masked_fill(skipped, 0.0), slopes.masked_fill(skipped, 0.0)

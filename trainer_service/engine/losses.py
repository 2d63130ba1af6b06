"""Losses as pure functions of target logprobs. Sums, never means; formulas in
proto/mintrpc/v1/types.proto.

`tokens` counts the targets of a tile, its documents one after the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer_service.jobs import Cispo, CrossEntropy, Dro, ImportanceSampling, Loss, Ppo


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What losses read beside the logprobs; each is [tokens] float32."""

    weights: Tensor
    logprobs: Tensor | None = None  # under the policy that sampled
    advantages: Tensor | None = None


def token_losses(loss: Loss, logprobs: Tensor, inputs: LossInputs) -> Tensor:  # [tokens]
    """The loss of each token. Differentiable with respect to `logprobs`."""
    return inputs.weights * _unweighted(loss, logprobs, inputs)


def _unweighted(loss: Loss, logprobs: Tensor, inputs: LossInputs) -> Tensor:  # [tokens]
    if isinstance(loss, CrossEntropy):
        return -logprobs
    assert inputs.logprobs is not None
    assert inputs.advantages is not None
    advantages = inputs.advantages
    log_ratio = logprobs - inputs.logprobs
    match loss:
        case ImportanceSampling():
            return -log_ratio.exp() * advantages
        case Ppo(low, high):
            ratio = log_ratio.exp()
            return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        case Cispo(low, high):
            return -log_ratio.exp().clamp(low, high).detach() * logprobs * advantages
        case Dro(beta):
            return -(logprobs * advantages - 0.5 * beta * log_ratio.square())


def differentiate(
    loss: Loss, logprobs: Tensor, inputs: LossInputs
) -> tuple[Tensor, Tensor]:  # [tokens], [tokens]
    """Each token's loss and its derivative with respect to that token's logprob."""
    if isinstance(loss, CrossEntropy):  # what most tiles ask for: a graph would cost more than it
        losses, slopes = -inputs.weights * logprobs, -inputs.weights
    else:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            losses = token_losses(loss, leaf, inputs)
            (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    # A weight of 0 contributes exactly nothing, also where ratio or logprob is not finite.
    skipped = inputs.weights == 0
    return losses.detach().masked_fill(skipped, 0.0), slopes.masked_fill(skipped, 0.0)

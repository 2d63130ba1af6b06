"""Losses as pure functions of target logprobs. Sums, never means; formulas in
proto/mintrpc/v1/types.proto and docs/losses.md.

`tokens` counts the targets of a tile, its documents one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mint_core.lora.spec import within_float32
from trainer_service.jobs import Cispo, CrossEntropy, Dro, Gspo, ImportanceSampling, Loss, Ppo

LARGEST_LOG_RATIO = 600.0  # exp of it times three float32 numbers is a float64


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What losses read beside the logprobs; each is [tokens] float32, in `differentiate` float64 of
    what overflows.
    """

    weights: Tensor  # [tokens, k] where k targets stand at each position
    logprobs: Tensor | None = None  # under the policy that sampled
    advantages: Tensor | None = None
    clip_low: Tensor | None = None  # instead of the loss's own
    clip_high: Tensor | None = None
    sequence_log_ratios: Tensor | None = None  # of the sequence to which each token belongs

    def at(self, places: Tensor | slice) -> "LossInputs":
        """The inputs of some of the tokens."""
        return self.each(lambda tensor: tensor[places])

    def each(self, change: Callable[[Tensor], Tensor]) -> "LossInputs":
        """The inputs, each changed."""
        given = (getattr(self, entry.name) for entry in fields(self))
        return LossInputs(*(None if value is None else change(value) for value in given))  # type: ignore[arg-type]


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
            return -_exp(log_ratio) * advantages
        case Ppo():
            return -_pessimistic(loss, _exp(log_ratio), inputs)
        case Cispo():
            return -_clipped(loss, _exp(log_ratio), inputs).detach() * logprobs * advantages
        case Dro(beta):
            return -(logprobs * advantages - within_float32(0.5 * beta) * log_ratio.square())
        case Gspo():
            assert inputs.sequence_log_ratios is not None
            own = (logprobs - logprobs.detach()).exp()  # 1, with the gradient of the logprob
            return -_pessimistic(loss, _exp(inputs.sequence_log_ratios) * own, inputs)


def _exp(log_ratio: Tensor) -> Tensor:
    """Finite in float64, so that 0 times it is 0; beyond what a float32 times it can hold."""
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


def _pessimistic(loss: Ppo | Gspo, ratio: Tensor, inputs: LossInputs) -> Tensor:  # [tokens]
    assert inputs.advantages is not None
    clipped = _clipped(loss, ratio, inputs)
    return torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)


def _clipped(loss: Ppo | Cispo | Gspo, ratio: Tensor, inputs: LossInputs) -> Tensor:  # [tokens]
    low, high = within_float32(loss.clip_low_threshold), within_float32(loss.clip_high_threshold)
    if inputs.clip_low is None and inputs.clip_high is None:
        return ratio.clamp(low, high)
    return ratio.clamp(
        torch.full_like(ratio, low) if inputs.clip_low is None else inputs.clip_low,
        torch.full_like(ratio, high) if inputs.clip_high is None else inputs.clip_high,
    )


def sequence_log_ratios(
    log_ratio: Tensor,  # [tokens]; read where the mask is 1
    mask: Tensor,  # [tokens], 0 or 1
    lengths: Sequence[int],  # of the documents
) -> Tensor:  # [tokens]
    """The logarithm of the ratio of the sequence to which each token belongs: the mean of its log
    ratios. 0 where a document has no token in its sequence.
    """
    ratios = []
    for values, chosen in zip(
        log_ratio.split(list(lengths)), mask.bool().split(list(lengths)), strict=True
    ):
        mean = values[chosen].mean() if chosen.any() else values.new_zeros(())
        ratios.append(mean.expand(len(values)))
    return torch.cat(ratios)


def differentiate(
    loss: Loss, logprobs: Tensor, inputs: LossInputs
) -> tuple[Tensor, Tensor]:  # both as `logprobs`
    """Each token's loss and its derivative with respect to that token's logprob. Not finite only
    where float32 cannot hold the number itself, or a logprob is not finite.
    """
    losses, slopes = _differentiate(loss, logprobs, inputs)
    # A ratio that overflows may be clipped away, or meet an advantage that is 0 or tiny.
    if not (losses.isfinite() & slopes.isfinite()).all():
        exact = _differentiate(loss, logprobs.double(), inputs.each(Tensor.double))
        losses = torch.where(losses.isfinite(), losses, exact[0].float())
        slopes = torch.where(slopes.isfinite(), slopes, exact[1].float())
    return losses, slopes


def _differentiate(loss: Loss, logprobs: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
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

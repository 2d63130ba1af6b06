"""AdamW on rows of the bank, those with equal hyperparameters in one call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mint_core.errors import FailedPrecondition
from mint_core.lora.bank import AdapterRow, Part
from trainer_service.jobs import AdamParams, StepResult


class NonFiniteGradient(FailedPrecondition):
    reason = "GRADIENT_NOT_FINITE"


@dataclass(frozen=True, slots=True)
class RowStep:
    """A step that a row is to take."""

    row: AdapterRow
    taken: int  # steps before it
    params: AdamParams

    @property
    def gradient(self) -> Tensor:  # [params]
        return self.row.part(Part.GRADIENT)


@torch.no_grad()
def step_rows(steps: Sequence[RowStep]) -> list[StepResult]:
    """Takes steps of several rows and clears their gradients; one that is not finite is cleared
    without a step. What becomes of a row does not depend on the others.

    torch's own fused AdamW runs over whole rows: padding has gradient 0 and weight 0, and stays 0.
    """
    gradients = [step.gradient for step in steps]
    norms = torch.stack(torch._foreach_norm(gradients)).tolist() if steps else []
    alike: dict[AdamParams, list[RowStep]] = {}
    for step, norm in zip(steps, norms, strict=True):
        if math.isfinite(norm):
            if 0 < step.params.grad_clip_norm < norm:
                # As torch.nn.utils.clip_grad_norm_ does.
                step.gradient.mul_(step.params.grad_clip_norm / (norm + 1e-6))
            alike.setdefault(step.params, []).append(step)
    for params, group in alike.items():
        _step_alike(group, params)
    if steps:
        torch._foreach_zero_(gradients)
    return [_result(step, norm) for step, norm in zip(steps, norms, strict=True)]


def _step_alike(steps: Sequence[RowStep], params: AdamParams) -> None:
    adamw(
        [step.row.part(Part.WEIGHTS) for step in steps],
        [step.gradient for step in steps],
        [step.row.part(Part.EXP_AVG) for step in steps],
        [step.row.part(Part.EXP_AVG_SQ) for step in steps],
        [],
        [step.gradient.new_full((), step.taken) for step in steps],
        fused=True,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )


def _result(step: RowStep, norm: float) -> StepResult:
    if math.isfinite(norm):
        return StepResult(step=step.taken + 1, grad_norm=norm)
    error = NonFiniteGradient(
        "the norm of the gradient is not finite (NaN, Inf, or too large for float32): it was "
        "cleared and no step was taken; lower the learning rate or check the data"
    )
    return StepResult(step=step.taken, grad_norm=norm, error=error)

"""AdamW on one row of the bank."""

import math

import torch
from torch.optim.adamw import adamw

from mint_core.errors import FailedPrecondition
from mint_core.lora.bank import AdapterRow, Part
from trainer_service.jobs import AdamParams, StepResult


class NonFiniteGradient(FailedPrecondition):
    reason = "GRADIENT_NOT_FINITE"


@torch.no_grad()
def step_row(row: AdapterRow, step: int, params: AdamParams) -> StepResult:
    """Takes step number `step` + 1 and clears the gradient; one that is not finite is cleared
    without a step.

    torch's own fused AdamW runs over the whole row: padding has gradient 0 and weight 0, and stays
    0.
    """
    gradient = row.part(Part.GRADIENT)
    norm = torch.linalg.vector_norm(gradient).item()
    if not math.isfinite(norm):
        gradient.zero_()
        error = NonFiniteGradient(
            "the norm of the gradient is not finite (NaN, Inf, or too large for float32): it was "
            "cleared and no step was taken; lower the learning rate or check the data"
        )
        return StepResult(step=step, grad_norm=norm, error=error)
    if 0 < params.grad_clip_norm < norm:
        gradient *= params.grad_clip_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ does
    adamw(
        [row.part(Part.WEIGHTS)],
        [gradient],
        [row.part(Part.EXP_AVG)],
        [row.part(Part.EXP_AVG_SQ)],
        [],
        [torch.tensor(float(step), device=gradient.device)],
        fused=True,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )
    gradient.zero_()
    return StepResult(step=step + 1, grad_norm=norm)

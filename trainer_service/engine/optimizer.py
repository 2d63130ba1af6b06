"""AdamW on rows of the bank, those with equal hyperparameters in one call."""

import math
from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from mint_core.errors import FailedPrecondition
from mint_core.lora.bank import Part
from trainer_service.engine.digests import digest
from trainer_service.engine.rows import TrainedRow
from trainer_service.jobs import AdamParams, StepResult


class NonFiniteGradient(FailedPrecondition):
    reason = "GRADIENT_NOT_FINITE"


@torch.no_grad()
def step_rows(steps: Sequence[tuple[TrainedRow, AdamParams]]) -> list[StepResult]:
    """Takes steps of several rows and clears their gradients; one that is not finite is cleared
    without a step. What becomes of a row does not depend on the others.

    torch's own fused AdamW runs over whole rows: padding has gradient 0 and weight 0, and stays 0.
    """
    gradients = [trained.row.part(Part.GRADIENT) for trained, _ in steps]
    norms = torch.stack(torch._foreach_norm(gradients)).tolist() if steps else []
    alike: dict[AdamParams, list[TrainedRow]] = {}
    for (trained, params), gradient, norm in zip(steps, gradients, norms, strict=True):
        if math.isfinite(norm):
            if 0 < params.grad_clip_norm < norm:
                # As torch.nn.utils.clip_grad_norm_ does.
                gradient.mul_(params.grad_clip_norm / (norm + 1e-6))
            alike.setdefault(params, []).append(trained)
    for params, group in alike.items():
        _step_alike(group, params)
    if steps:
        torch._foreach_zero_(gradients)
    return [_result(trained, norm) for (trained, _), norm in zip(steps, norms, strict=True)]


def _step_alike(stepping: Sequence[TrainedRow], params: AdamParams) -> None:
    rows = [trained.row for trained in stepping]
    gradients = [row.part(Part.GRADIENT) for row in rows]
    adamw(
        [row.part(Part.WEIGHTS) for row in rows],
        gradients,
        [row.part(Part.EXP_AVG) for row in rows],
        [row.part(Part.EXP_AVG_SQ) for row in rows],
        [],
        [gradients[0].new_full((), trained.step) for trained in stepping],
        fused=True,
        amsgrad=False,
        beta1=params.beta1,
        beta2=params.beta2,
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        eps=params.eps,
        maximize=False,
    )


def _result(trained: TrainedRow, norm: float) -> StepResult:
    trained.gradient_pending = False
    if math.isfinite(norm):
        trained.step += 1
        trained.weight_digest = known = digest(trained.row.part(Part.WEIGHTS))
        return StepResult(step=trained.step, grad_norm=norm, weight_digest=known)
    error = NonFiniteGradient(
        "the norm of the gradient is not finite (NaN, Inf, or too large for float32): it was "
        "cleared and no step was taken; lower the learning rate or check the data"
    )
    return StepResult(step=trained.step, grad_norm=norm, error=error)

"""AdamW on rows of the bank, those with equal hyperparameters in one call."""

import math
from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from mint_core.errors import MintError
from mint_core.lora.bank import AdapterRow, Part
from trainer_service.engine.digests import digest
from trainer_service.engine.trained_row import TrainedRow
from trainer_service.errors import NonFiniteGradient, NonFiniteStep
from trainer_service.jobs import AdamParams, StepResult, StepRow

# From here on the end of float32 is near: what may come so far is looked at.
_FAR = 1e37
_LARGEST_SQUARED = 1e18  # whose square is not far
_LEAST_EPS = 1e-30


@torch.no_grad()
def step_rows(steps: Sequence[tuple[TrainedRow, StepRow]]) -> list[StepResult]:
    """Takes steps of several rows and clears their gradients. A row whose gradient is not finite,
    or would not be after the step, stays as it was. What becomes of a row does not depend on the
    others.

    torch's own fused AdamW runs over whole rows: padding has gradient 0 and weight 0, and stays 0.
    """
    gradients = [trained.row.part(Part.GRADIENT) for trained, _ in steps]
    norms = torch.stack(torch._foreach_norm(gradients)).tolist() if steps else []
    alike: dict[AdamParams, list[TrainedRow]] = {}
    errors: list[MintError | None] = []
    for (trained, step), gradient, norm in zip(steps, gradients, norms, strict=True):
        params = step.adam_params
        error: MintError | None = None
        if 0 < params.grad_clip_norm < norm:
            # As torch.nn.utils.clip_grad_norm_ does.
            gradient.mul_(params.grad_clip_norm / (norm + 1e-6))
        if not math.isfinite(norm):
            error = NonFiniteGradient()
        elif _stays_finite(trained, params, norm) or step.replayed:
            alike.setdefault(params, []).append(trained)
        elif not _step_if_finite(trained, params):
            error = NonFiniteStep(params.learning_rate, params.eps, params.weight_decay)
        errors.append(error)
    for params, group in alike.items():
        _step_alike(group, params)
    if steps:
        torch._foreach_zero_(gradients)
    return [
        _result(trained, norm, error)
        for (trained, _), norm, error in zip(steps, norms, errors, strict=True)
    ]


def _stays_finite(trained: TrainedRow, params: AdamParams, norm: float) -> bool:
    """Whether weights and moments are sure to be finite after the step: by how large they can have
    become since they were looked at, so that it costs nothing to know.
    """
    weight, moment = trained.largest or largest(trained.row)
    moment = max(moment, norm)  # averages of gradients, and of their squares
    rate = params.learning_rate / (1 - params.beta1 ** (trained.step + 1))
    decay = params.learning_rate * params.weight_decay
    weight = weight * (1 + decay) + rate * moment / max(params.eps, _LEAST_EPS)
    numbers = weight, rate, rate * moment, decay, params.eps
    sure = max(numbers) < _FAR and moment < _LARGEST_SQUARED and params.eps >= _LEAST_EPS
    trained.largest = (weight, moment) if sure else None
    return sure


def largest(row: AdapterRow, *, moments: bool = True) -> tuple[float, float]:
    """The largest weight, and what no moment or root of a second one exceeds: a second moment
    below 0 has none. NaN where one is. Without moments they are 0, and not looked at.
    """
    if not moments:
        return row.part(Part.WEIGHTS).norm(math.inf).item(), 0.0
    parts = [row.part(part) for part in (Part.WEIGHTS, Part.EXP_AVG, Part.EXP_AVG_SQ)]
    weight, first, second = torch.stack(torch._foreach_norm(parts, math.inf)).tolist()
    negative = bool(parts[-1].amin() < 0)
    return weight, math.inf if negative else first + math.sqrt(second)


def _step_if_finite(trained: TrainedRow, params: AdamParams) -> bool:
    """Takes a step, and takes it back to the bit if it leaves what is not finite."""
    parts = [trained.row.part(part) for part in (Part.WEIGHTS, Part.EXP_AVG, Part.EXP_AVG_SQ)]
    before = [part.to("cpu", copy=True) for part in parts]
    _step_alike([trained], params)
    if all(part.isfinite().all() for part in parts):
        return True
    for part, old in zip(parts, before, strict=True):
        part.copy_(old)
    return False


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


def _result(trained: TrainedRow, norm: float, error: MintError | None) -> StepResult:
    trained.gradient_pending = False
    if error is not None:
        return StepResult(step=trained.step, grad_norm=norm, error=error)
    trained.step += 1
    trained.weight_digest = known = digest(trained.row.part(Part.WEIGHTS))
    return StepResult(step=trained.step, grad_norm=norm, weight_digest=known)

"""Optimizer steps of several rows at once against one at a time."""

import pytest
import torch

from mint_core.lora.bank import AdapterBank, AdapterRow, Part
from mint_core.lora.groups import LinearShape, complete
from mint_core.lora.spec import AdapterSpec
from trainer_service.engine.optimizer import NonFiniteGradient, RowStep, step_rows
from trainer_service.jobs import AdamParams

PARAMS = [
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
    AdamParams(learning_rate=1e-3, weight_decay=0.1),
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
]
RANKS = (8, 16, 8, 8)
BROKEN = 3  # has a NaN in its gradient


def make_steps() -> list[RowStep]:
    bank = AdapterBank(complete({"m": LinearShape(24, 40)}), torch.device("cpu"))
    return [RowStep(make_row(bank, i), 3 * i, params) for i, params in enumerate(PARAMS)]


def make_row(bank: AdapterBank, number: int) -> AdapterRow:
    row = bank.add(
        AdapterSpec(rank=RANKS[number], alpha=8.0, use_rslora=False, seed=0, modules=("m",))
    )
    generator = torch.Generator().manual_seed(number)
    for part in Part:
        row.part(part).copy_(torch.rand(row.bank.row_size, generator=generator))
    if number == BROKEN:
        row.part(Part.GRADIENT)[5] = torch.nan
    return row


def test_steps_together_are_steps_one_by_one_bitwise() -> None:
    together, alone = make_steps(), make_steps()
    results = step_rows(together)
    for i, step in enumerate(alone):
        (expected,) = step_rows([step])
        assert results[i].step == expected.step
        for part in Part:
            assert torch.equal(together[i].row.part(part), step.row.part(part))
        if i != BROKEN:
            assert results[i].grad_norm == expected.grad_norm


def test_a_gradient_that_is_not_finite_is_cleared_and_not_stepped_on() -> None:
    steps = make_steps()
    before = steps[BROKEN].row.part(Part.WEIGHTS).clone()
    results = step_rows(steps)
    assert [isinstance(result.error, NonFiniteGradient) for result in results] == [
        i == BROKEN for i in range(len(steps))
    ]
    assert results[BROKEN].step == steps[BROKEN].taken
    assert torch.equal(steps[BROKEN].row.part(Part.WEIGHTS), before)
    assert not any(step.gradient.any() for step in steps)


def test_a_step_is_what_torchs_optimizer_takes() -> None:
    step = make_steps()[2]
    weights = step.row.part(Part.WEIGHTS).clone().requires_grad_()
    weights.grad = step.gradient.clone()
    optimizer = torch.optim.AdamW([weights], lr=1e-3, weight_decay=0.1)
    optimizer.state[weights] = {
        "step": torch.tensor(float(step.taken)),
        "exp_avg": step.row.part(Part.EXP_AVG).clone(),
        "exp_avg_sq": step.row.part(Part.EXP_AVG_SQ).clone(),
    }
    optimizer.step()
    (result,) = step_rows([step])
    assert result.step == step.taken + 1
    assert result.grad_norm == pytest.approx(weights.grad.norm().item(), rel=1e-6)
    torch.testing.assert_close(step.row.part(Part.WEIGHTS), weights.detach())


def test_no_steps_are_no_work() -> None:
    assert step_rows([]) == []

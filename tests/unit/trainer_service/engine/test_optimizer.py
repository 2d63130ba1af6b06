"""Optimizer steps of several rows at once against one at a time."""

import pytest
import torch

from mint_core.lora.bank import AdapterBank, AdapterRow, Part
from mint_core.lora.groups import LinearShape, complete
from mint_core.lora.spec import AdapterSpec
from trainer_service.engine.optimizer import NonFiniteGradient, step_rows
from trainer_service.engine.rows import TrainedRow
from trainer_service.jobs import AdamParams

PARAMS = [
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
    AdamParams(learning_rate=1e-3, weight_decay=0.1),
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
]
RANKS = (8, 16, 8, 8)
BROKEN = 3  # has a NaN in its gradient


def make_steps() -> list[tuple[TrainedRow, AdamParams]]:
    bank = AdapterBank(complete({"m": LinearShape(24, 40)}), torch.device("cpu"))
    return [(TrainedRow(make_row(bank, i), 3 * i), params) for i, params in enumerate(PARAMS)]


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
            assert torch.equal(together[i][0].row.part(part), step[0].row.part(part))
        if i != BROKEN:
            assert results[i].grad_norm == expected.grad_norm


def test_a_gradient_that_is_not_finite_is_cleared_and_not_stepped_on() -> None:
    steps = make_steps()
    before = steps[BROKEN][0].row.part(Part.WEIGHTS).clone()
    results = step_rows(steps)
    assert [isinstance(result.error, NonFiniteGradient) for result in results] == [
        i == BROKEN for i in range(len(steps))
    ]
    assert results[BROKEN].step == steps[BROKEN][0].step == 3 * BROKEN
    assert torch.equal(steps[BROKEN][0].row.part(Part.WEIGHTS), before)
    assert not any(trained.row.part(Part.GRADIENT).any() for trained, _ in steps)


def test_a_step_is_what_torchs_optimizer_takes() -> None:
    trained, params = make_steps()[2]
    row = trained.row
    weights = row.part(Part.WEIGHTS).clone().requires_grad_()
    weights.grad = row.part(Part.GRADIENT).clone()
    optimizer = torch.optim.AdamW([weights], lr=1e-3, weight_decay=0.1)
    optimizer.state[weights] = {
        "step": torch.tensor(float(trained.step)),
        "exp_avg": row.part(Part.EXP_AVG).clone(),
        "exp_avg_sq": row.part(Part.EXP_AVG_SQ).clone(),
    }
    optimizer.step()
    (result,) = step_rows([(trained, params)])
    assert result.step == trained.step == 3 * 2 + 1
    assert result.grad_norm == pytest.approx(weights.grad.norm().item(), rel=1e-6)
    torch.testing.assert_close(row.part(Part.WEIGHTS), weights.detach())


def test_no_steps_are_no_work() -> None:
    assert step_rows([]) == []

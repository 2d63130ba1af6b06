"""Optimizer steps of several rows at once against one at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mint_core.lora.bank import AdapterBank, AdapterRow, Part
from mint_core.lora.groups import LinearShape, complete
from mint_core.lora.spec import AdapterSpec
from trainer_service.engine.optimizer import step_rows
from trainer_service.engine.trained_row import TrainedRow
from trainer_service.errors import NonFiniteGradient, NonFiniteStep
from trainer_service.jobs import AdamParams, StepRow

PARAMS = [
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
    AdamParams(learning_rate=1e-3, weight_decay=0.1),
    AdamParams(learning_rate=1e-2, grad_clip_norm=1.0),
]
RANKS = (8, 16, 8, 8)
BROKEN = 3  # has a NaN in its gradient


def make_steps() -> list[tuple[TrainedRow, StepRow]]:
    bank = AdapterBank(complete({"m": LinearShape(24, 40)}), torch.device("cpu"))
    return [
        (TrainedRow(make_row(bank, i), 3 * i), StepRow(f"r{i}", params))
        for i, params in enumerate(PARAMS)
    ]


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
    trained, step = make_steps()[2]
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
    (result,) = step_rows([(trained, step)])
    assert result.step == trained.step == 3 * 2 + 1
    assert result.grad_norm == pytest.approx(weights.grad.norm().item(), rel=1e-6)
    torch.testing.assert_close(row.part(Part.WEIGHTS), weights.detach())


def test_no_steps_are_no_work() -> None:
    assert step_rows([]) == []


STEPPED = (Part.WEIGHTS, Part.EXP_AVG, Part.EXP_AVG_SQ)
SCALES = st.sampled_from([0.0, 1.0, 1e-20, 1e10, 1e18, 1e25, 3e38])
SIGNED = st.sampled_from([0.0, 1.0, -1.0, -1e18, 1e25, -3e38])


@st.composite
def steps_of_any_size(draw: st.DrawFn) -> tuple[TrainedRow, StepRow]:
    row = make_steps()[0][0].row
    for part in Part:
        row.part(part).mul_(draw(SCALES))
    row.part(Part.EXP_AVG_SQ)[3] = draw(st.sampled_from([0.0, 0.0, -1.0, 3e38]))
    row.part(Part.WEIGHTS)[4] = draw(SIGNED)
    params = AdamParams(
        learning_rate=draw(st.sampled_from([0.0, 1e-3, 1.0, 1e20, 3e38, 1e300])),
        eps=draw(st.sampled_from([0.0, 1e-300, 1e-50, 1e-30, 1e-8, 1.0, 1e38, 1e300])),
        beta1=draw(st.sampled_from([0.0, 0.9, 1 - 1e-16])),
        beta2=draw(st.sampled_from([0.0, 0.999, 1 - 1e-16])),
        weight_decay=draw(st.sampled_from([0.0, 0.1, 1e20, 1e300])),
        grad_clip_norm=draw(st.sampled_from([0.0, 1.0, 1e25, 1e300])),
    )
    return TrainedRow(row, draw(st.sampled_from([0, 1, 10**6]))), StepRow("r", params)


@given(steps_of_any_size())
def test_no_step_leaves_what_is_not_finite(drawn: tuple[TrainedRow, StepRow]) -> None:
    """Where torch's own step would, the row stays as it was; else it is torch's own to the bit."""
    trained, step = drawn
    row = trained.row
    before = {part: row.part(part).clone() for part in Part}
    taken_before = trained.step

    (result,) = step_rows([drawn])

    after = {part: row.part(part).clone() for part in Part}
    assert not after[Part.GRADIENT].any()
    for part in Part:
        row.part(part).copy_(before[part])
    trained.step = taken_before
    (again,) = step_rows([(trained, StepRow("r", step.adam_params, replayed=True))])
    if isinstance(again.error, NonFiniteGradient):
        assert isinstance(result.error, NonFiniteGradient)
        return
    finite = all(row.part(part).isfinite().all() for part in STEPPED)
    assert finite == (result.error is None)
    if not finite:
        assert isinstance(result.error, NonFiniteStep)
        assert result.step == taken_before
    for part in STEPPED:
        assert torch.equal(after[part], row.part(part) if finite else before[part])


def test_what_is_known_of_a_rows_numbers_holds_through_a_hundred_steps() -> None:
    """So that nothing need be looked at after each step."""
    trained, step = make_steps()[0]
    step = StepRow("r", AdamParams(learning_rate=0.3, weight_decay=0.5, eps=1e-3))
    for seed in range(100):
        torch.manual_seed(seed)
        trained.row.part(Part.GRADIENT).normal_(0, 10 ** (seed % 7))
        assert step_rows([(trained, step)])[0].error is None
        assert trained.largest is not None
        weight, moment = trained.largest
        assert trained.row.part(Part.WEIGHTS).abs().max() <= weight
        assert trained.row.part(Part.EXP_AVG).abs().max() <= moment
        assert trained.row.part(Part.EXP_AVG_SQ).sqrt().max() <= moment

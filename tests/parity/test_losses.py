"""Single losses against their formulas, token by token."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from torch import Tensor

from trainer_service.engine.losses import LossInputs, differentiate, sequence_log_ratios
from trainer_service.engine.recorded.losses import NUMBERS, LossTable, note
from trainer_service.jobs import Cispo, Dro, Gspo, ImportanceSampling, Loss, Ppo

TOKENS = 40
LENGTHS = (7, 1, 32)


def draw(seed: int) -> Tensor:
    return torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed))


def inputs(**changes: Tensor | None) -> LossInputs:
    given = {"weights": draw(1).abs(), "logprobs": draw(2) - 3, "advantages": draw(3)}
    return LossInputs(**given | changes)  # type: ignore[arg-type]


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens() -> None:
    log_ratio, mask = draw(4), (draw(5) > 0).float()
    mask[7] = 0  # the second document has none

    ratios = sequence_log_ratios(log_ratio, mask, LENGTHS).exp()

    start = 0
    for length in LENGTHS:
        chosen = [log_ratio[i].exp().item() for i in range(start, start + length) if mask[i]]
        product = 1.0
        for ratio in chosen:
            product *= ratio
        expected = product ** (1 / len(chosen)) if chosen else 1.0
        assert ratios[start : start + length].tolist() == pytest.approx([expected] * length)
        start += length


def test_gspo_is_one_ratio_and_one_clip_per_sequence() -> None:
    """With one advantage per sequence and weights of 1 / length: equation 5 of the paper."""
    logprobs, old = draw(6) / 10 - 3, draw(7) / 10 - 3
    for advantage in (1.5, -0.7):
        leaf = logprobs.clone().requires_grad_()
        ratio = (leaf - old).mean().exp()
        wanted = -torch.minimum(ratio * advantage, ratio.clip(0.95, 1.05) * advantage)
        (slopes,) = torch.autograd.grad(wanted, leaf)
        given = inputs(
            weights=torch.full((TOKENS,), 1 / TOKENS),
            logprobs=old,
            advantages=torch.full((TOKENS,), advantage),
            sequence_log_ratios=sequence_log_ratios(logprobs - old, torch.ones(TOKENS), (TOKENS,)),
        )

        losses, ours = differentiate(Gspo(0.95, 1.05), logprobs, given)

        assert losses.sum().item() == pytest.approx(wanted.item(), rel=1e-5)
        assert torch.allclose(ours, slopes, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("loss", [Ppo(0.7, 1.1), Cispo(0.7, 1.1)], ids=str)
@pytest.mark.parametrize("given", ["both", "low", "high"])
def test_thresholds_of_single_tokens_clip_those_tokens(loss: Ppo | Cispo, given: str) -> None:
    low = None if given == "high" else draw(8).abs() / 2
    high = None if given == "low" else 1 + draw(9).abs()
    logprobs = draw(10) - 3

    losses, slopes = differentiate(loss, logprobs, inputs(clip_low=low, clip_high=high))

    for i in range(TOKENS):
        alone = type(loss)(
            loss.clip_low_threshold if low is None else low[i].item(),
            loss.clip_high_threshold if high is None else high[i].item(),
        )
        place = slice(i, i + 1)
        expected = differentiate(alone, logprobs[place], inputs().at(place))
        assert losses[i].item() == pytest.approx(expected[0].item())
        assert slopes[i].item() == pytest.approx(expected[1].item())


@pytest.mark.parametrize("loss", [Ppo(), Cispo()], ids=str)
def test_thresholds_equal_to_the_losss_change_nothing(loss: Loss) -> None:
    logprobs, ones = draw(10) - 3, torch.ones(TOKENS)

    plain = differentiate(loss, logprobs, inputs())
    given = differentiate(loss, logprobs, inputs(clip_low=0.8 * ones, clip_high=1.2 * ones))

    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))


LARGEST = float(np.finfo(np.float32).max)
FACTORS = st.sampled_from([0.0, 1.0, -1.0, 0.3, -2.5, 1e-4, 1e-15, -1e-15, 1e15, -1e15])
LOG_RATIOS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([0.0, 87.0, 88.0, 89.0, -89.0, 100.0, -104.0, 700.0, 710.0, 1e4, -1e4]),
)
ORACLES: list[Loss] = [
    *(ImportanceSampling(), Ppo(), Ppo(0.0, 1e38), Ppo(0.5, 1e300), Cispo(), Cispo(0.0, 1e38)),
    *(Dro(0.0), Dro(0.1), Dro(1e30), Gspo(), Gspo(0.0, 1e39)),
]


def product(log_ratio: float, *factors: float) -> float:
    """exp(log_ratio) times the factors, in float64: nothing overflows on the way."""
    if 0.0 in factors:
        return 0.0
    log = log_ratio + sum(math.log(abs(factor)) for factor in factors)
    sign = math.prod(math.copysign(1.0, factor) for factor in factors)
    return sign * (math.exp(log) if log < 700 else math.inf)


def oracle(loss: Loss, lp: float, q: float, a: float, w: float, sequence: float) -> list[float]:
    """Loss and slope of a token by docs/losses.md; `sequence`: log ratio of its sequence."""
    l = sequence if isinstance(loss, Gspo) else lp - q  # noqa: E741
    if isinstance(loss, Dro):
        return [-w * (lp * a - loss.beta / 2 * l * l), -w * (a - loss.beta * l)]
    if isinstance(loss, ImportanceSampling):
        return [-product(l, w, a), -product(l, w, a)]
    assert isinstance(loss, Ppo | Cispo | Gspo)
    low, high = loss.clip_low_threshold, loss.clip_high_threshold
    high = high if high <= LARGEST else math.inf  # no float32 holds it
    bound = low if product(l, 1.0) < low else high if product(l, 1.0) > high else None
    if isinstance(loss, Cispo):
        if bound is None:
            return [-product(l, w, lp, a), -product(l, w, a)]
        return [-w * bound * lp * a, -w * bound * a]
    if a == 0 or w == 0:
        return [0.0, 0.0]
    if bound is None or (bound == high) != (a > 0):
        return [-product(l, w, a), -product(l, w, a)]
    return [-w * bound * a, 0.0]


def by_table(loss: Loss, logprobs: Tensor, given: LossInputs) -> tuple[Tensor, Tensor]:
    """As a recorded pass computes them, each token in a document of its own."""
    tokens = len(logprobs)
    own = np.zeros((NUMBERS, tokens), np.float32)
    kinds = note(loss, given, own)
    if isinstance(loss, Gspo):
        assert given.sequence_log_ratios is not None
        own[1] = (logprobs - given.sequence_log_ratios).numpy()
        own[6] = 1.0
    own[7] = 1.0
    places = torch.arange(tokens + 1)
    table = LossTable(torch.full((tokens,), kinds), torch.from_numpy(own), places[:-1], places)
    return table.differentiate(logprobs)


@for_all(st.lists(st.tuples(LOG_RATIOS, FACTORS, FACTORS, LOG_RATIOS), min_size=1, max_size=6))
@pytest.mark.parametrize("way", [differentiate, by_table])
@pytest.mark.parametrize("loss", ORACLES, ids=str)
def test_extremes_agree_with_the_formulas_in_float64(
    loss: Loss,
    way: Callable[[Loss, Tensor, LossInputs], tuple[Tensor, Tensor]],
    tokens: list[tuple[float, float, float, float]],
) -> None:
    """Whatever is multiplied by 0 or clipped away. What float32 cannot hold is not finite."""
    lp = -2.5
    log_ratios, advantages, weights, sequences = map(torch.tensor, zip(*tokens, strict=True))
    given = LossInputs(
        weights=weights.abs(),
        logprobs=lp - log_ratios,
        advantages=advantages,
        sequence_log_ratios=sequences,
    )

    ours = way(loss, torch.full_like(weights, lp), given)

    assert given.logprobs is not None
    for i in range(len(tokens)):
        q, a, w = given.logprobs[i].item(), advantages[i].item(), weights[i].abs().item()
        rel = 1e-5 + 1e-6 * abs(lp - q)  # the ratio's logarithm is rounded
        scale = max(abs(a * w), 1.0) * 1e-36
        wanted = oracle(loss, lp, q, a, w, sequences[i].item())
        for each, value in zip(ours, wanted, strict=True):
            if abs(value) > 0.99 * LARGEST:
                assert not each[i].isfinite() or abs(each[i].item()) > 0.9 * LARGEST
                break  # nor need what is made of it be right
            assert each[i].item() == pytest.approx(value, rel=rel, abs=scale)


@pytest.mark.parametrize("loss", [ImportanceSampling(), Ppo(), Cispo(), Dro(0.1), Gspo()], ids=str)
def test_a_token_that_adds_nothing_changes_no_bit_of_the_rest(loss: Loss) -> None:
    logprobs, given = draw(10) - 3, inputs(sequence_log_ratios=draw(11) / 10)
    plain = differentiate(loss, logprobs, given)
    assert given.logprobs is not None
    old = given.logprobs.clone()
    old[::5] = -1e4  # the ratio overflows
    weights = torch.ones(TOKENS)
    weights[::5] = 0.0
    for changes in ({"weights": weights * given.weights}, {"advantages": weights * draw(3)}):
        if isinstance(loss, Dro) and "advantages" in changes:
            continue  # its other term stays
        odd = dataclasses.replace(given, logprobs=old, **changes)

        losses, slopes = differentiate(loss, logprobs, odd)

        assert not losses[::5].any()
        assert not slopes[::5].any()
        for each, before in zip((losses, slopes), plain, strict=True):
            assert torch.equal(each[weights > 0], before[weights > 0])

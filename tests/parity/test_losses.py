"""Single losses against their formulas, token by token."""

import pytest
import torch
from torch import Tensor

from trainer_service.engine.losses import LossInputs, differentiate, sequence_ratios
from trainer_service.jobs import Cispo, Gspo, Loss, Ppo

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

    ratios = sequence_ratios(log_ratio, mask, LENGTHS)

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
            sequence_ratios=sequence_ratios(logprobs - old, torch.ones(TOKENS), (TOKENS,)),
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

"""Penalties against their definitions, token by token, and against transformers' own."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from sampler_service.engine.drawing.penalties import Occurrences, penalize, penalizes
from sampler_service.jobs import Choice

VOCABULARY = 300


def occurrences(prompt: list[int], generated: list[int]) -> Occurrences:
    seen = Occurrences(np.array(prompt, np.int64))
    for token in generated:
        seen.add(token)
    return seen


def by_definition(
    logits: list[float], choice: Choice, prompt: list[int], generated: list[int]
) -> list[float]:
    counts = Counter(generated)
    penalized = []
    for token, logit in enumerate(logits):
        if token in prompt or token in counts:
            repetition = choice.repetition_penalty
            logit = logit / repetition if logit > 0 else logit * repetition
        if token in counts:
            logit -= choice.frequency_penalty * counts[token] + choice.presence_penalty
        penalized.append(logit)
    return penalized


@pytest.mark.parametrize(
    "choice",
    [
        Choice(seed=0, repetition_penalty=1.7),
        Choice(seed=0, repetition_penalty=0.5, presence_penalty=-1.0),
        Choice(seed=0, presence_penalty=1.5),
        Choice(seed=0, frequency_penalty=0.3),
        Choice(seed=0, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=-0.2),
    ],
)
def test_penalties_are_what_their_definitions_say(choice: Choice) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 3, (6, VOCABULARY))).float()
    texts = [
        (rng.integers(0, VOCABULARY, 40).tolist(), rng.integers(0, 90, 30 * row).tolist())
        for row in range(6)
    ]
    expected = [
        by_definition(row, choice, *text) for row, text in zip(logits.tolist(), texts, strict=True)
    ]
    penalize(logits, range(6), [choice] * 6, [occurrences(*text) for text in texts])
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_rows_that_are_not_named_stay_as_they_are() -> None:
    logits = torch.ones(3, VOCABULARY)
    choice = Choice(seed=0, presence_penalty=1.0)
    penalize(logits, [1], [choice], [occurrences([], [4, 4])])
    assert torch.equal(logits[[0, 2]], torch.ones(2, VOCABULARY))
    assert logits[1].sum() == VOCABULARY - 1


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(0, 3, (1, VOCABULARY))).float()
    prompt, generated = ([5, 6, 7, 6], [9, 5, 250])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([prompt + generated]), logits.clone()
    )
    choice = Choice(seed=0, repetition_penalty=1.3)
    penalize(logits, [0], [choice], [occurrences(prompt, generated)])
    torch.testing.assert_close(logits, expected)


def test_penalties_of_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0]])
    choice = Choice(seed=0, repetition_penalty=0.01)
    penalize(logits, [0], [choice], [occurrences([0, 1, 2], [])])
    assert logits.isfinite().all()


def test_neutral_penalties_count_nothing() -> None:
    assert not penalizes(Choice(seed=0, min_p=0.5, top_k=3))
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert penalizes(Choice(seed=0, **{name: 0.5}))  # type: ignore[arg-type]

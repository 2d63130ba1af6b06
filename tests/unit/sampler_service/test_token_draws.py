"""Draws follow the exact distribution and depend on nothing but their counter."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mint_core.model.softmax import ranked_exactly
from mint_core.rpc.limits import MAX_TOPK_LOGPROBS
from sampler_service.engine.drawing.narrowing import draw_narrowed
from sampler_service.engine.drawing.penalties import Occurrences
from sampler_service.engine.drawing.randomness import Draw, philox, uniforms
from sampler_service.engine.drawing.recorded_draws import RecordedDraws
from sampler_service.engine.drawing.sums import PLAIN, Sums
from sampler_service.engine.drawing.token_draws import TOPK, draw_tokens
from sampler_service.jobs import Choice
from tests.recorders import PlainRecorder

VOCABULARY = 12
DRAWS = 20_000
# 99.99 % points of chi-squared by degrees of freedom: a right sampler fails once in 10,000 seeds.
CHI_SQUARED_LIMITS = {
    1: 15.1,
    2: 18.4,
    3: 21.1,
    4: 23.5,
    5: 25.7,
    6: 27.9,
    7: 29.9,
    8: 31.8,
    11: 37.4,
}

Floats = NDArray[np.float64]


def logits() -> torch.Tensor:  # [VOCABULARY]
    values = np.random.default_rng(3).permutation(np.linspace(0, 2, VOCABULARY))
    return torch.from_numpy(values).float()


def softmax(values: Floats) -> Floats:
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum())


def top_k(p: Floats, k: int) -> Floats:
    kept = np.where(p >= np.sort(p)[-k], p, 0)
    return np.asarray(kept / kept.sum())


def top_p(p: Floats, share: float) -> Floats:
    order = np.argsort(-p)
    stays = np.zeros(len(p), bool)
    total = 0.0
    for token in order:
        stays[token] = True
        total += p[token]
        if total >= share:
            break
    kept = np.where(stays, p, 0)
    return np.asarray(kept / kept.sum())


def min_p(p: Floats, share: float) -> Floats:
    kept = np.where(p >= share * p.max(), p, 0)
    return np.asarray(kept / kept.sum())


@pytest.mark.parametrize(
    ("choice", "narrow"),
    [
        (Choice(seed=1), lambda p: p),
        (Choice(seed=2, temperature=0.5), lambda p: p),
        (Choice(seed=3, temperature=2.0), lambda p: p),
        (Choice(seed=4, top_k=4), lambda p: top_k(p, 4)),
        (Choice(seed=5, top_p=0.6), lambda p: top_p(p, 0.6)),
        (Choice(seed=6, top_k=6, top_p=0.8), lambda p: top_p(top_k(p, 6), 0.8)),
        (Choice(seed=7, temperature=0.7, top_k=7, top_p=0.9), lambda p: top_p(top_k(p, 7), 0.9)),
        (Choice(seed=8, min_p=0.4), lambda p: min_p(p, 0.4)),
        (Choice(seed=9, temperature=2.0, min_p=0.5), lambda p: min_p(p, 0.5)),
        (Choice(seed=10, top_p=0.7, min_p=0.3), lambda p: min_p(top_p(p, 0.7), 0.3)),
        (Choice(seed=11, top_k=3, min_p=0.1), lambda p: top_k(p, 3)),
    ],
)
def test_draws_follow_the_exact_distribution(
    choice: Choice, narrow: Callable[[Floats], Floats]
) -> None:
    expected = narrow(softmax(logits().double().numpy() / choice.temperature))
    draws = [Draw(choice, sample=i % 100, position=i // 100) for i in range(DRAWS)]
    drawn = draw_tokens(logits().expand(DRAWS, -1), draws).tokens
    counts = np.bincount(drawn, minlength=VOCABULARY)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - DRAWS * expected)[possible] ** 2 / (DRAWS * expected[possible])).sum()
    assert chi_squared < CHI_SQUARED_LIMITS[possible.sum() - 1]


def test_temperature_zero_takes_the_likeliest_token() -> None:
    draws = [Draw(Choice(seed=i, temperature=0.0, top_k=3, top_p=0.5), i, i) for i in range(50)]
    assert set(draw_tokens(logits().expand(50, -1), draws).tokens) == {int(logits().argmax())}


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 0.3, 1.0, 5.0, 1e30])
def test_logprobs_are_those_before_top_k_and_top_p(temperature: float) -> None:
    choice = Choice(seed=0, temperature=temperature, top_k=3, top_p=0.7)
    drawn = draw_tokens(logits().expand(20, -1), [Draw(choice, i, 0) for i in range(20)])
    at_one = np.log(softmax(logits().double().numpy()))
    with np.errstate(divide="ignore"):  # near temperature 0 all but one token are impossible
        at_temperature = np.log(softmax(logits().double().numpy() / (temperature or 1.0)))
    np.testing.assert_allclose(drawn.model_logprobs, at_one[drawn.tokens], atol=1e-6)
    np.testing.assert_allclose(drawn.logprobs, at_temperature[drawn.tokens], atol=1e-4)


def test_at_temperature_one_both_logprobs_are_the_same_bits() -> None:
    drawn = draw_tokens(logits()[None], [Draw(Choice(seed=0), 0, 0)])
    assert drawn.logprobs.tobytes() == drawn.model_logprobs.tobytes()


@pytest.mark.parametrize("sums", [PLAIN, Sums(row_wise=True)])
def test_a_row_does_not_depend_on_its_neighbours(sums: Sums) -> None:
    rng = np.random.default_rng(0)
    many = torch.from_numpy(rng.normal(0, 3, (40, 5000))).float()
    choices = [
        Choice(seed=1, top_k=40, top_p=0.9),
        Choice(seed=2),
        Choice(seed=3, temperature=0.0),
        Choice(seed=4, temperature=0.8, min_p=0.02, presence_penalty=1.0, repetition_penalty=1.3),
        Choice(seed=5, frequency_penalty=-0.5, top_p=0.9),
    ]
    draws = [
        Draw(
            choices[i % 5],
            i,
            2 * i,
            occurrences=occurrences(rng.integers(0, 5000, 30), rng) if i % 5 > 2 else None,
            allowed=rng.random(5000) < 0.1 if i % 4 == 1 else None,
            topk=i % 3,
        )
        for i in range(40)
    ]
    together = draw_tokens(many, draws, sums)
    for i in range(40):
        alone = draw_tokens(many[i : i + 1].clone(), draws[i : i + 1], sums)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == together.logprobs[i]
        assert alone.model_logprobs[0] == together.model_logprobs[i]
        if draws[i].topk:
            assert alone.top_ids.tobytes() == together.top_ids[i : i + 1].tobytes()
            assert alone.top_logprobs.tobytes() == together.top_logprobs[i : i + 1].tobytes()


def test_sums_of_whole_numbers_are_exact_in_any_order_and_draw_the_same() -> None:
    rng = np.random.default_rng(0)
    powers = torch.from_numpy(rng.exponential(0.01, (3, 50, 256))).float().clamp(max=1.0)
    sums = Sums(row_wise=True)
    shuffled = powers[:, :, rng.permutation(256)][:, rng.permutation(50)]
    totals = [sums.running_stretches(each)[:, -1] for each in (powers, shuffled)]
    assert torch.equal(*totals)
    expected = powers.double().flatten(1).cumsum(1)
    torch.testing.assert_close(sums.running(powers.flatten(1)), expected, rtol=1e-9, atol=1e-9)
    many = torch.from_numpy(rng.normal(0, 3, (200, 5000))).float()
    choices = (Choice(seed=1), Choice(seed=2, top_p=0.9), Choice(seed=3, top_k=9, temperature=0.7))
    draws = [Draw(choices[i % 3], i, 0, topk=i % 2) for i in range(200)]
    ours, theirs = (draw_tokens(many, draws, each) for each in (sums, PLAIN))
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.top_ids.tobytes() == theirs.top_ids.tobytes()
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-6)


def test_of_equal_scores_at_the_last_rank_the_smaller_ids_are_among_them() -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0, -0.0, 0.0, -2.0, 3.0], [-1.0] * 7])
    by_sort = scores.sort(dim=1, descending=True, stable=True)
    for ranks in (1, 3, 4, 7):
        values, ids = ranked_exactly(scores, ranks)
        assert torch.equal(values, by_sort.values[:, :ranks])
        assert torch.equal(ids, by_sort.indices[:, :ranks])


def occurrences(prompt: NDArray[np.int64], rng: np.random.Generator) -> Occurrences:
    seen = Occurrences(prompt)
    for token in rng.integers(0, 5000, 200).tolist():
        seen.add(token)
    return seen


def test_only_allowed_tokens_are_drawn_and_logprobs_are_those_of_all() -> None:
    allowed = np.zeros(VOCABULARY, bool)
    allowed[[1, 5, 7]] = True
    p = softmax(logits().double().numpy())
    for choice in (
        Choice(seed=1),
        Choice(seed=1, temperature=0.0),
        Choice(seed=1, top_k=5),
        Choice(seed=1, top_p=0.9, min_p=0.01),
    ):
        draws = [Draw(choice, i, 0, allowed=allowed) for i in range(200)]
        drawn = draw_tokens(logits().expand(200, -1), draws)
        likeliest = [int(np.where(allowed, p, 0).argmax())]
        assert set(drawn.tokens) == set(likeliest if choice.temperature == 0 else [1, 5, 7])
        np.testing.assert_allclose(drawn.model_logprobs, np.log(p)[drawn.tokens], atol=1e-6)


def test_the_likeliest_tokens_are_the_models_whatever_is_drawn_from() -> None:
    choice = Choice(seed=1, temperature=0.5, presence_penalty=2.0, top_k=2)
    seen = Occurrences(np.array([], np.int64))
    seen.add(int(logits().argmax()))
    (free, bent) = (Draw(choice, 0, 0, topk=4), Draw(choice, 0, 0, occurrences=seen, topk=4))
    drawn = draw_tokens(logits().expand(2, -1), [free, bent])
    expected = logits().log_softmax(0).sort(descending=True)
    for row in range(2):
        assert drawn.top_ids[row].tolist() == expected.indices.tolist()
        np.testing.assert_allclose(drawn.top_logprobs[row], expected.values, atol=1e-6)
        place = drawn.top_ids[row].tolist().index(drawn.tokens[row])
        assert drawn.top_logprobs[row, place] == drawn.model_logprobs[row]


def test_as_many_likeliest_tokens_are_looked_for_as_may_be_asked_for() -> None:
    assert TOPK == MAX_TOPK_LOGPROBS


@pytest.mark.parametrize("sums", [PLAIN, Sums(row_wise=True)])
def test_recorded_draws_are_the_same_to_the_bit(sums: Sums) -> None:
    rng = np.random.default_rng(0)
    most = torch.from_numpy(rng.normal(0, 3, (64, 5000))).float()
    most[3, 9], most[4, 0] = float("nan"), float("inf")
    recorder = PlainRecorder()
    recorded = RecordedDraws(most, recorder, sums)
    for count in (1, 40, 33):
        choices = [Choice(seed=i, temperature=(1.0, 0.0, 0.7)[i % 3]) for i in range(count)]
        draws = [Draw(choice, i, 2 * i + count) for i, choice in enumerate(choices)]
        ours = recorded.draw(most[:count], draws)
        expected = draw_tokens(most[:count], draws, sums)
        assert ours is not None
        assert (ours.finite == expected.finite).all()
        for name in ("tokens", "logprobs", "model_logprobs"):
            own, theirs = (getattr(drawn, name)[expected.finite] for drawn in (ours, expected))
            assert own.tobytes() == theirs.tobytes(), name
        assert ours.top_ids.shape == ours.top_logprobs.shape == (count, 0)
    assert recorder.replays == 1  # 33 rows are filled up as 40 are


@pytest.mark.parametrize(
    "draw",
    [
        Draw(Choice(seed=0, top_p=0.9), 0, 0),
        Draw(Choice(seed=0), 0, 0, topk=1),
        Draw(Choice(seed=0), 0, 0, allowed=np.ones(10, bool)),
    ],
)
def test_what_takes_more_is_not_drawn_by_what_is_recorded(draw: Draw) -> None:
    most = torch.zeros(4, 10)
    recorded = RecordedDraws(most, None)
    plain = Draw(Choice(seed=0), 0, 0)
    assert recorded.draw(most[:2], [plain, draw]) is None
    assert recorded.draw(most[:2].clone(), [plain, plain]) is None
    assert recorded.draw(most[:2], [plain, plain]) is not None


def test_logits_that_are_not_finite_are_told_and_harm_no_neighbour() -> None:
    rows = logits().expand(3, -1).clone()
    rows[1, 4] = float("nan")
    rows[2, 0] = float("inf")
    drawn = draw_tokens(rows, [Draw(Choice(seed=9), 0, 0)] * 3)
    assert drawn.finite.tolist() == [True, False, False]
    alone = draw_tokens(logits()[None], [Draw(Choice(seed=9), 0, 0)])
    assert drawn.tokens[0] == alone.tokens[0]


@pytest.mark.parametrize(
    "choice",
    [
        Choice(seed=0, min_p=0.05),
        Choice(seed=0, temperature=3.0, min_p=0.3),
        Choice(seed=0, temperature=0.6, top_k=9, min_p=0.01),
        Choice(seed=0, top_p=0.8, min_p=0.1),
        Choice(seed=0, temperature=1.5, top_k=20, top_p=0.9, min_p=0.02),
    ],
)
def test_what_is_left_is_what_the_warpers_of_transformers_leave(choice: Choice) -> None:
    many = torch.from_numpy(np.random.default_rng(4).normal(0, 2, (1, 50))).float()
    left = many / choice.temperature
    if choice.top_k > 0:
        left = TopKLogitsWarper(choice.top_k)(None, left)  # type: ignore[arg-type]
    left = TopPLogitsWarper(choice.top_p)(None, left)  # type: ignore[arg-type]
    left = MinPLogitsWarper(choice.min_p)(None, left)  # type: ignore[arg-type]
    drawn = draw_tokens(many.expand(4000, -1), [Draw(choice, i, 0) for i in range(4000)])
    likely = torch.nonzero(left[0].softmax(0) > 0.005)[:, 0].tolist()  # 4,000 draws meet these
    assert set(likely) <= set(drawn.tokens.tolist())
    assert left[0, drawn.tokens].isfinite().all()


def test_ties_of_top_k_leave_exactly_k_tokens() -> None:
    draws = [Draw(Choice(seed=1, top_k=3), i, 0) for i in range(200)]
    assert set(draw_tokens(torch.zeros(200, 10), draws).tokens) == {0, 1, 2}


SCORES = st.lists(st.integers(0, 12), min_size=2, max_size=40)


@given(
    SCORES,
    st.integers(-1, 45),
    st.floats(0.01, 1.0),
    st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
    st.floats(1e-6, 1 - 1e-6),
)
def test_few_ranks_draw_what_all_ranks_draw(
    steps: list[int], k: int, share: float, least: float, uniform: float
) -> None:
    """Whole steps, so that many scores are equal."""
    scores = -torch.tensor([steps], dtype=torch.float32) / 3
    scores -= scores.max()
    choice = Choice(seed=0, top_k=k or 1, top_p=share, min_p=least)
    totals = scores.double().exp().sum(1)
    drawn = [
        draw_narrowed(scores, totals, [choice], torch.tensor([uniform]).double(), ranks).item()
        for ranks in ([], [1, 2, 4, 8, 16], [5])
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_logits_far_apart_are_drawn_by_their_probabilities() -> None:
    """Over more than one stretch of the vocabulary, most of it as good as impossible."""
    many = torch.full((1, 5000), -200.0)
    many[0, [3, 255, 256, 4999]] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    draws = [Draw(Choice(seed=1), i, 0) for i in range(4000)]
    drawn = draw_tokens(many.expand(4000, -1), draws).tokens
    shares = [float((drawn == token).mean()) for token in (3, 255, 256, 4999)]
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.03)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 1023), st.integers(0, 2**31))
def test_uniforms_lie_strictly_between_0_and_1(seed: int, sample: int, position: int) -> None:
    (uniform,) = uniforms([Draw(Choice(seed=seed), sample, position)])
    assert 0 < uniform < 1


def test_seed_sample_and_position_each_change_the_draw() -> None:
    counters = [(s, i, p) for s in (-1, 0, 1, 2**40) for i in range(5) for p in range(5)]
    drawn = uniforms([Draw(Choice(seed=s), i, p) for s, i, p in counters])
    assert len(set(drawn)) == len(counters)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_authors_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = [np.array([word], np.uint64) for word in (*counter, *key)]
    answer = philox((words[0], words[1], words[2], words[3]), (words[4], words[5]))
    assert tuple(int(word[0]) for word in answer) == expected

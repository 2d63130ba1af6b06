"""The sampler against slower ways to the same numbers: transformers' own generation and forward,
the trainer's engine, and itself alone.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mint_core.errors import FailedPrecondition
from mint_core.lora.spec import LoraRequest
from sampler_service.engine.cache.blocks import BLOCK_TOKENS
from sampler_service.jobs import BASE_MODEL, CHUNK_TOKENS, Generated, Stops
from tests.engines_in_process import RowArrays, as_source, make_engine, run_plan
from tests.models import VOCABULARY_SIZE, tiny_gemma2, tiny_mistral, tiny_qwen3
from tests.parity.sampler_checks import (
    assert_bitwise,
    assert_busy_is_idle,
    assert_count_changes_no_sample,
    assert_greedy_is_generate,
    random_tokens,
)
from tests.sampler_in_process import SamplerEngine
from trainer_service.jobs import CreateRow, CrossEntropy, Document, Tile

TOLERANCE = 1e-5
ALL = "mint://r-1/sampler_weights/all@1"
ATTENTION = "mint://r-2/sampler_weights/attn@1"
HEAD = "mint://r-3/sampler_weights/head@7"
REQUESTS = {
    ALL: LoraRequest(rank=8),
    ATTENTION: LoraRequest(rank=3, train_mlp=False, train_unembed=False),
    HEAD: LoraRequest(rank=16, train_mlp=False, train_attn=False, use_rslora=True),
}
ADAPTERS = (BASE_MODEL, *REQUESTS)


def make_sampler(folder: Path, **changes: object) -> SamplerEngine:
    sampler = SamplerEngine(folder, **changes)
    for seed, (path, request) in enumerate(REQUESTS.items()):
        sampler.load(path, request, random=seed)
    return sampler


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path) -> SamplerEngine:
    return make_sampler(qwen3_folder)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_mistral, tiny_gemma2])
@pytest.mark.parametrize("prompt_tokens", [1, 2, 16, 17, CHUNK_TOKENS + 40])
def test_greedy_equals_generate(make: object, prompt_tokens: int, tmp_path: Path) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    assert_greedy_is_generate(SamplerEngine(folder), folder, prompt_tokens, TOLERANCE)


@pytest.mark.parametrize("penalty", [0.8, 1.4])
def test_greedy_with_a_repetition_penalty_equals_generate(
    penalty: float, sampler: SamplerEngine, qwen3_folder: Path
) -> None:
    prompt = random_tokens(7, 30)
    generated = sampler.generate(prompt, temperature=0.0, repetition_penalty=penalty, max_tokens=40)
    model = AutoModelForCausalLM.from_pretrained(qwen3_folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    whole = model.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, repetition_penalty=penalty
    )[0]
    assert generated.continuations[0].tokens.tolist() == whole[len(prompt) :].tolist()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_model_logprobs_equal_the_trainers(
    adapter: str, qwen3_folder: Path, sampler: SamplerEngine
) -> None:
    prompt = random_tokens(1, 60)
    generated = sampler.generate(
        prompt, adapter=adapter, max_tokens=40, seed=3, temperature=1.3, prompt_logprobs=True
    )
    trainer = make_engine(qwen3_folder)
    if adapter == BASE_MODEL:
        trainer.run(CreateRow("run", LoraRequest(rank=8)))  # B is zero
    else:
        spec = sampler.row(adapter).spec
        with as_source(spec, RowArrays(weights=sampler.arrays[adapter])) as source:
            trainer.run(CreateRow("run", source))
    (continuation,) = generated.continuations
    tokens = np.concatenate([np.array(prompt), continuation.tokens])
    document = Document(
        tokens=tokens[:-1], targets=tokens[1:], weights=np.ones(len(tokens) - 1, np.float32)
    )
    tile = Tile(
        training_run_id="run",
        sequence=1,
        index=0,
        documents=(document,),
        loss=CrossEntropy(),
        backward=False,
        weighted_only=False,
    )
    trained = run_plan(trainer, tile)[0].logprobs[0]
    scores = generated.prompt_logprobs
    assert scores is not None
    difference = np.abs(np.concatenate([scores, continuation.model_logprobs]) - trained)
    assert difference.mean() <= TOLERANCE
    assert difference.max() <= 1e-3


def test_a_busy_server_gives_the_bits_of_an_idle_one(sampler: SamplerEngine) -> None:
    wishes = [
        {
            "prompt": random_tokens(i, length),
            "adapter": ADAPTERS[i % len(ADAPTERS)],
            "num_samples": 1 + i % 3,
            "max_tokens": 12,
            "seed": i,
            "temperature": (1.0, 0.7, 0.0)[i % 3],
            "top_k": (-1, 20)[i % 2],
            "min_p": (0.0, 0.0, 0.1)[i % 3],
            "presence_penalty": (0.0, 1.5)[i // 2 % 2],
            "repetition_penalty": (1.0, 1.0, 1.2)[i % 3],
            "prompt_logprobs": i % 2 == 0,
            "topk_sample_logprobs": i % 3,
        }
        for i, length in enumerate([1, 2, 5, 30, 64, 100, CHUNK_TOKENS + 90, 33])
    ]
    assert_busy_is_idle(sampler, wishes, ADAPTERS)


def test_a_sample_is_the_same_however_many_there_are(sampler: SamplerEngine) -> None:
    assert_count_changes_no_sample(sampler, ALL)


def test_seeds_repeat_and_differ(sampler: SamplerEngine) -> None:
    prompt = random_tokens(2, 10)
    first, again = (sampler.generate(prompt, seed=-5) for _ in range(2))
    assert_bitwise(first, again)
    other = sampler.generate(prompt, seed=-6)
    assert other.continuations[0].tokens.tolist() != first.continuations[0].tokens.tolist()


def test_sequences_sent_away_come_back_with_the_same_tokens(qwen3_folder: Path) -> None:
    wishes = [
        {
            "prompt": random_tokens(i, 40),
            "max_tokens": 100,
            "seed": i,
            "frequency_penalty": 0.5 * (i % 2),
        }
        for i in range(5)
    ]
    roomy = SamplerEngine(qwen3_folder)
    tight = SamplerEngine(qwen3_folder, kv_cache_tokens=320)
    expected = [roomy.generate(**wish) for wish in wishes]  # type: ignore[arg-type]
    numbers = [tight.submit(**wish) for wish in wishes]  # type: ignore[arg-type]
    for left, number in zip(expected, numbers, strict=True):
        right = tight.answer(number)
        a, b = left.continuations[0], right.continuations[0]
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.model_logprobs, b.model_logprobs, atol=TOLERANCE)


def test_top_prompt_logprobs_are_the_likeliest_of_the_full_distribution(
    sampler: SamplerEngine, qwen3_folder: Path
) -> None:
    prompt = random_tokens(6, CHUNK_TOKENS + 30)
    generated = sampler.generate(prompt, topk_prompt_logprobs=5, prompt_logprobs=True)
    top, scores = generated.topk_prompt_logprobs, generated.prompt_logprobs
    assert top is not None
    assert scores is not None
    model = AutoModelForCausalLM.from_pretrained(qwen3_folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.topk(5, dim=1).values.numpy()
    np.testing.assert_allclose(top.logprobs, expected, atol=TOLERANCE)
    by_id = logprobs.gather(1, torch.from_numpy(top.token_ids)).numpy()
    np.testing.assert_allclose(top.logprobs, by_id, atol=TOLERANCE)
    hit = top.token_ids == np.array(prompt[1:])[:, None]
    assert (top.logprobs[hit] == scores[hit.any(1)]).all()


def test_targets_and_likeliest_tokens_are_those_of_the_full_distribution(
    sampler: SamplerEngine, qwen3_folder: Path
) -> None:
    prompt = random_tokens(5, CHUNK_TOKENS + 30)
    rng = np.random.default_rng(8)
    targets = rng.integers(-1, VOCABULARY_SIZE, (len(prompt) - 1, 7))
    generated = sampler.generate(
        prompt,
        max_tokens=6,
        temperature=0.7,
        topk_sample_logprobs=4,
        target_prompt_tokens=targets,
        prompt_logprobs=True,
    )
    (continuation,) = generated.continuations
    model = AutoModelForCausalLM.from_pretrained(qwen3_folder, dtype=torch.float32)
    whole = torch.tensor([[*prompt, *continuation.tokens.tolist()]])
    with torch.no_grad():
        logprobs = model(whole).logits[0, :-1].log_softmax(-1)
    expected = logprobs[: len(targets)].gather(1, torch.from_numpy(targets).clamp(min=0)).numpy()
    expected[targets < 0] = np.nan
    np.testing.assert_allclose(generated.target_prompt_logprobs, expected, atol=TOLERANCE)
    top = continuation.topk_logprobs
    assert top is not None
    likeliest = logprobs[len(prompt) - 1 :].topk(4, dim=1)
    assert top.token_ids.tolist() == likeliest.indices.tolist()
    np.testing.assert_allclose(top.logprobs, likeliest.values.numpy(), atol=TOLERANCE)
    drawn = top.token_ids == continuation.tokens[:, None]
    assert (top.logprobs[drawn] == continuation.model_logprobs[drawn.any(1)]).all()
    plain = sampler.generate(prompt, max_tokens=6, temperature=0.7, prompt_logprobs=True)
    assert_bitwise(plain, generated)


def test_alternatives_of_a_prompt_are_drawn_from_the_full_distribution(
    sampler: SamplerEngine, qwen3_folder: Path
) -> None:
    prompt = random_tokens(5, CHUNK_TOKENS + 30)
    wishes = {"adapter": HEAD, "max_tokens": 4, "prompt_logprobs": True}
    plain = sampler.generate(prompt, seed=3, **wishes)
    generated = sampler.generate(prompt, seed=3, prompt_alternatives=50, **wishes)
    assert_bitwise(plain, generated)
    drawn = generated.prompt_alternatives
    assert drawn is not None
    targets = sampler.generate(prompt, target_prompt_tokens=drawn.token_ids, **wishes)
    np.testing.assert_allclose(drawn.logprobs, targets.target_prompt_logprobs, atol=TOLERANCE)

    every = np.tile(np.arange(VOCABULARY_SIZE), (len(prompt) - 1, 1))
    logprobs = sampler.generate(prompt, target_prompt_tokens=every, **wishes).target_prompt_logprobs
    assert logprobs is not None
    # In the mean a position's logprobs are its negated entropy: how far its 50 draws are off must
    # spread as chance has it.
    p = np.exp(logprobs.astype(np.float64))
    entropies = -(p * logprobs).sum(1)
    deviations = np.sqrt(((p * logprobs**2).sum(1) - entropies**2) / drawn.logprobs.shape[1])
    off = (drawn.logprobs.mean(1) + entropies) / deviations
    assert abs(off.mean()) < 5 / np.sqrt(len(off))
    assert abs(off.std() - 1) < 0.2
    first, second = drawn.token_ids[:, 0], drawn.token_ids[:, 1]
    assert (first != second).mean() > 0.9  # independent of each other, for all that a seed is one

    other = sampler.generate(prompt, seed=4, prompt_alternatives=50, **wishes).prompt_alternatives
    again = sampler.generate(
        prompt, seed=3, prompt_alternatives=2, scored_tokens=40, **wishes
    ).prompt_alternatives
    assert other is not None
    assert again is not None
    assert (other.token_ids != drawn.token_ids).mean() > 0.9
    assert again.token_ids.tolist() == drawn.token_ids[-40:, :2].tolist()


@pytest.mark.parametrize("last", [1, 40, CHUNK_TOKENS + 20, 5000])
def test_the_last_scores_are_those_of_scoring_all(last: int, qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder)
    prompt = random_tokens(11, CHUNK_TOKENS + 100)
    targets = np.random.default_rng(3).integers(-1, VOCABULARY_SIZE, (len(prompt) - 1, 2))
    wishes = {"topk_prompt_logprobs": 3, "target_prompt_tokens": targets, "prompt_logprobs": True}
    whole = sampler.generate(prompt, adapter=ALL, **wishes)
    for _ in range(2):
        few = sampler.generate(prompt, adapter=ALL, scored_tokens=last, **wishes)
        n = min(last, len(prompt) - 1)
        assert few.unscored_tokens == len(prompt) - n
        assert few.prompt_cache_hit_tokens == (len(prompt) - 1 - n) // BLOCK_TOKENS * BLOCK_TOKENS
        for left, right in zip(_scores(whole), _scores(few), strict=True):
            np.testing.assert_allclose(left[-n:], right, atol=TOLERANCE)
            assert len(right) == n


def _scores(generated: Generated) -> tuple[object, ...]:
    top = generated.topk_prompt_logprobs
    assert top is not None
    return generated.prompt_logprobs, top.logprobs, top.token_ids, generated.target_prompt_logprobs


def test_scoring_alone_gives_the_scores_of_sampling(sampler: SamplerEngine) -> None:
    for prompt in (random_tokens(3, 1), random_tokens(3, 2), random_tokens(3, 700)):
        scored = sampler.generate(prompt, num_samples=0, prompt_logprobs=True, adapter=HEAD)
        sampled = sampler.generate(prompt, num_samples=1, prompt_logprobs=True, adapter=HEAD)
        assert scored.continuations == ()
        assert scored.prompt_logprobs is not None
        assert sampled.prompt_logprobs is not None
        assert scored.prompt_logprobs.tobytes() == sampled.prompt_logprobs.tobytes()
        assert len(scored.prompt_logprobs) == len(prompt) - 1


@pytest.mark.parametrize(("factor", "alpha"), [(1e30, 16.0), (1.0, 3e38)])
def test_an_adapter_that_overflows_fails_its_own_requests_alone(
    qwen3_folder: Path, factor: float, alpha: float
) -> None:
    sampler = make_sampler(qwen3_folder)
    bad = "mint://r-9/sampler_weights/bad@1"
    spec = replace(sampler.row(ALL).spec, alpha=alpha)
    huge = {name: array * np.float32(factor) for name, array in sampler.arrays[ALL].items()}
    sampler.load_arrays(bad, spec, huge)
    prompt = random_tokens(4, 30)
    expected = sampler.generate(prompt, adapter=ALL, seed=1)
    culprit = sampler.submit(prompt, adapter=bad, num_samples=2)
    scored = sampler.submit(prompt, adapter=bad, num_samples=0, prompt_logprobs=True)
    neighbour = sampler.submit(prompt, adapter=ALL, seed=1)
    for number in (culprit, scored):
        with pytest.raises(FailedPrecondition, match="are not finite"):
            sampler.answer(number)
    assert_bitwise(expected, sampler.answer(neighbour))
    assert not sampler.engine.busy


def test_an_aborted_request_leaves_nothing_behind(sampler: SamplerEngine) -> None:
    number = sampler.submit(random_tokens(8, 900), num_samples=30, max_tokens=500)
    for _ in range(5):
        sampler.step()
    assert sampler.engine.busy
    sampler.abort(number)
    assert not sampler.engine.busy


def test_stops_end_samples(sampler: SamplerEngine) -> None:
    prompt = random_tokens(12, 10)
    free = sampler.generate(prompt, seed=1, max_tokens=30).continuations[0].tokens.tolist()
    stop = free[7]
    ended = sampler.generate(
        prompt, seed=1, max_tokens=30, stops=Stops(token_ids=frozenset({stop}))
    )
    assert ended.continuations[0].tokens.tolist() == free[: free.index(stop) + 1]

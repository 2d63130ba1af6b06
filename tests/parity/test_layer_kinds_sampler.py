"""The sampler on models whose layers have experts, or mix tokens through states, or both. Each
sequence has states of its own, beside the paged cache of the layers that attend.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mint_core.errors import EngineFault
from mint_core.lora.spec import LoraRequest
from sampler_service.engine.cache.blocks import blocks_for
from sampler_service.engine.cache.prefixes import STATE_TOKENS
from sampler_service.engine.decoder import Decoder
from sampler_service.jobs import BASE_MODEL, CHUNK_TOKENS, Generated
from tests.engines_in_process import make_engine, score
from tests.families.hybrids import BY_DEFAULT, HYBRID_MIXTURES, HYBRIDS
from tests.families.mixtures import MIXTURES
from tests.family import Family, params
from tests.parity.sampler_checks import (
    assert_bitwise,
    assert_busy_is_idle,
    assert_count_changes_no_sample,
    assert_greedy_is_generate,
    assert_same_but_for_ties,
    bits,
    random_tokens,
)
from tests.parity.test_sampler_prefixes import joined
from tests.sampler_in_process import SamplerEngine
from trainer_service.engine.engine import Engine

TOLERANCE = 1e-5
ALL = "mint://r-1/sampler_weights/all@1"
MIXING = "mint://r-2/sampler_weights/attn@1"
REQUESTS = {ALL: LoraRequest(rank=8), MIXING: LoraRequest(rank=3, train_mlp=False)}
ADAPTERS = (BASE_MODEL, *REQUESTS)
WITH_STATES = [each for each in (*HYBRIDS, *HYBRID_MIXTURES) if not each.reads_more_than_text]


def make_sampler(folder: Path, **changes: object) -> SamplerEngine:
    sampler = SamplerEngine(folder, **changes)
    for seed, (path, request) in enumerate(REQUESTS.items()):
        sampler.load(path, request, random=seed)
    return sampler


@pytest.fixture(scope="module", params=params([*WITH_STATES, *MIXTURES], BY_DEFAULT))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: Family = request.param
    return family.make(tmp_path_factory.mktemp(family.id))


@pytest.fixture(scope="module", params=params(WITH_STATES, BY_DEFAULT))
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with states."""
    family: Family = request.param
    return family.make(tmp_path_factory.mktemp(family.id))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder)


@pytest.fixture(scope="module")
def sampler(folder: Path) -> SamplerEngine:
    return make_sampler(folder)


@pytest.mark.parametrize("prompt_tokens", [1, 2, 17, CHUNK_TOKENS + 40])
def test_greedy_equals_generate(folder: Path, sampler: SamplerEngine, prompt_tokens: int) -> None:
    assert_greedy_is_generate(sampler, folder, prompt_tokens, 2 * TOLERANCE)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_model_logprobs_equal_the_trainers(
    adapter: str, engine: Engine, sampler: SamplerEngine
) -> None:
    prompt = random_tokens(1, 60)
    generated = sampler.generate(
        prompt, adapter=adapter, max_tokens=40, seed=3, temperature=1.3, prompt_logprobs=True
    )
    (continuation,) = generated.continuations
    own = (sampler.row(adapter).spec, sampler.arrays[adapter]) if adapter else ()
    trained = score(engine, [*prompt, *continuation.tokens.tolist()], *own)
    assert generated.prompt_logprobs is not None
    ours = np.concatenate([generated.prompt_logprobs, continuation.model_logprobs])
    assert np.abs(ours - trained).mean() <= TOLERANCE
    assert np.abs(ours - trained).max() <= 1e-3


def test_a_busy_server_gives_the_bits_of_an_idle_one(sampler: SamplerEngine) -> None:
    wishes: list[dict[str, Any]] = [
        {
            "prompt": random_tokens(i, length),
            "adapter": ADAPTERS[i % len(ADAPTERS)],
            "num_samples": 1 + i % 3,
            "max_tokens": 12,
            "seed": i,
            "prompt_logprobs": i % 2 == 0,
        }
        for i, length in enumerate([1, 2, 5, 30, 64, 100, CHUNK_TOKENS + 90, 33])
    ]
    assert_busy_is_idle(sampler, wishes, ADAPTERS)


def test_a_sample_is_the_same_however_many_there_are(sampler: SamplerEngine) -> None:
    assert_count_changes_no_sample(sampler, ALL)


def test_a_stream_hands_out_the_same(sampler: SamplerEngine) -> None:
    wish: dict[str, Any] = {"prompt": random_tokens(10, 40), "num_samples": 3, "seed": 1}
    whole = sampler.generate(**wish)
    number = sampler.submit(**wish, stream=True)
    sampler.answer(number)
    assert_bitwise(whole, Generated(continuations=joined(sampler.parts[number])))


def test_a_known_prompt_gives_the_same_bits(hybrid: Path) -> None:
    sampler = make_sampler(hybrid)
    for adapter in (BASE_MODEL, ALL):
        for n in (1, 2, 16, 17, 100, CHUNK_TOKENS + 1, CHUNK_TOKENS + 77):
            wish: dict[str, Any] = {"prompt": random_tokens(n, n), "adapter": adapter, "seed": n}
            first, again = (sampler.generate(**wish, num_samples=3) for _ in range(2))
            assert bits(first) == bits(again)
            assert first.prompt_cache_hit_tokens == 0
            assert again.prompt_cache_hit_tokens == n - 1


def test_a_beginning_is_found_up_to_the_last_state_that_is_kept(hybrid: Path) -> None:
    sampler = make_sampler(hybrid)
    beginning = random_tokens(1, 2 * STATE_TOKENS - 20)
    sampler.generate(beginning)
    prompt = [*beginning, *random_tokens(2, 60)]
    ours = sampler.generate(prompt, seed=5)
    assert ours.prompt_cache_hit_tokens == STATE_TOKENS
    assert bits(ours) == bits(make_sampler(hybrid).generate(prompt, seed=5))


def test_requests_that_come_together_give_the_bits_of_one_alone(folder: Path) -> None:
    prompt = random_tokens(3, CHUNK_TOKENS + 90)
    alone = [make_sampler(folder).generate(prompt, seed=seed) for seed in range(3)]
    group = make_sampler(folder)
    numbers = [group.submit(prompt, seed=seed) for seed in range(3)]
    assert [bits(group.answer(number)) for number in numbers] == [bits(g) for g in alone]


@pytest.mark.parametrize("tight", [{"kv_cache_tokens": 320}, {"max_running_samples": 2}])
def test_sequences_sent_away_come_back_with_the_same_tokens(
    folder: Path, sampler: SamplerEngine, tight: dict[str, int]
) -> None:
    """For want of blocks, or of slots for states."""
    wishes: list[dict[str, Any]] = [
        {"prompt": random_tokens(i, 40), "max_tokens": 40, "seed": i, "num_samples": 2}
        for i in range(4)
    ]
    expected = [sampler.answer(number) for number in [sampler.submit(**w) for w in wishes]]
    short = SamplerEngine(folder, **tight)
    numbers = [short.submit(**wish) for wish in wishes]
    for wish, whole, number in zip(wishes, expected, numbers, strict=True):
        assert_same_but_for_ties(folder, wish, whole, short.answer(number), 2 * TOLERANCE)


def test_a_pass_that_is_computed_again_takes_no_row_in_twice(sampler: SamplerEngine) -> None:
    """One request's draw raises behind a pass in which others decode."""
    wishes: dict[str, Any] = {"num_samples": 2, "seed": 5, "max_tokens": 20}
    prompt = random_tokens(4, 40)
    expected = sampler.generate(prompt, adapter=ALL, **wishes)
    early = sampler.submit(prompt, adapter=ALL, **wishes)
    for _ in range(6):
        sampler.step()
    culprit = sampler.submit(random_tokens(5, 30), temperature="a")
    with pytest.raises(EngineFault, match="failed at this call with"):
        sampler.answer(culprit)
    assert bits(sampler.answer(early)) == bits(expected)


def test_decoding_over_static_tensors_gives_what_ordinary_passes_give(hybrid: Path) -> None:
    """As it is recorded on a GPU; here it runs unrecorded."""

    def generate(sampler: SamplerEngine) -> list[Generated]:
        numbers = []
        for i, length in enumerate([1, 2, 17, 100, CHUNK_TOKENS + 40, 33]):
            adapter = ADAPTERS[i % len(ADAPTERS)]
            numbers.append(
                sampler.submit(
                    random_tokens(i, length), adapter=adapter, num_samples=1 + i % 3, seed=i
                )
            )
            sampler.step()
        return [sampler.answer(number) for number in numbers]

    expected = generate(make_sampler(hybrid))
    sampler = make_sampler(hybrid)
    runner = sampler.engine.runner
    runner.decoder = Decoder(
        sampler.engine.base,
        runner.cache,
        most_rows=16,
        most_blocks=blocks_for(sampler.model.context_length),
        scratch_block=len(next(iter(runner.cache._layers.values()))[0]) - 1,
        columns=128,
    )
    for ours, theirs in zip(generate(sampler), expected, strict=True):
        for a, b in zip(ours.continuations, theirs.continuations, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            np.testing.assert_allclose(a.model_logprobs, b.model_logprobs, atol=2 * TOLERANCE)


def test_states_are_counted_where_memory_is(hybrid: Path) -> None:
    sampler = SamplerEngine(hybrid)
    cache = sampler.engine.runner.cache
    assert cache.states.slots == 2 * 16 + 1
    slots_bytes = (cache.states.slots - 1) * cache.states.slot_bytes
    blocks_bytes = sampler.engine.kv_cache_tokens // 16 * cache.block_bytes
    assert sampler.engine.memory_limits["kv_cache"] == slots_bytes + blocks_bytes

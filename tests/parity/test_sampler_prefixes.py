"""What the sampler finds in its cache, computes in pieces, or computes again is what it would have
computed whole; streamed or not, alone or among others.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_core.errors import FailedPrecondition
from mint_core.lora.spec import LoraRequest
from sampler_service.engine.cache.blocks import BLOCK_TOKENS
from sampler_service.engine.drawing.randomness import Draw, uniforms
from sampler_service.jobs import (
    BASE_MODEL,
    CHUNK_TOKENS,
    Choice,
    Continuation,
    DropAdapter,
    Generated,
    SamplePart,
    StopReason,
    Stops,
    WaitedTooLong,
)
from tests.parity.sampler_checks import bits, random_tokens
from tests.sampler_in_process import SamplerEngine

TOLERANCE = 1e-5
BOUNDARY = 1e-4  # how near a draw must be to another token to become it
ALL = "mint://r-1/sampler_weights/all@1"


def make_sampler(folder: Path, **changes: object) -> SamplerEngine:
    sampler = SamplerEngine(folder, **changes)
    sampler.load(ALL, LoraRequest(rank=8), random=0)
    return sampler


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path) -> SamplerEngine:
    """Whose cache knows what other tests have asked for."""
    return make_sampler(qwen3_folder)


@pytest.fixture(scope="module")
def fresh(qwen3_folder: Path) -> SamplerEngine:
    """For what is scored, and so found in no cache."""
    return SamplerEngine(qwen3_folder)


class BoundaryDraws:
    """Knows how near a draw is to another token, from transformers' own forward."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def distance(self, tokens: list[int], seed: int, sample: int, position: int) -> float:
        """From the draw that follows `tokens` to the nearest bound between two tokens."""
        logits = self._model(torch.tensor([tokens])).logits[0, -1]
        bounds = logits.double().softmax(0).cumsum(0).numpy()
        (drawn,) = uniforms([Draw(Choice(seed=seed), sample, position)])
        return float(np.abs(bounds - drawn).min())

    def assert_same(
        self, ours: Generated, whole: Generated, prompt: list[int], *, seed: int
    ) -> None:
        """Base model, temperature 1: logprobs agree, and tokens do up to such a draw."""
        pairs = zip(ours.continuations, whole.continuations, strict=True)
        for sample, (a, b) in enumerate(pairs):
            differing = np.flatnonzero(a.tokens != b.tokens)
            same = int(differing[0]) if len(differing) else len(a.tokens)
            np.testing.assert_allclose(
                a.model_logprobs[:same], b.model_logprobs[:same], atol=TOLERANCE
            )
            if same < len(a.tokens):
                before = [*prompt, *a.tokens[:same].tolist()]
                assert self.distance(before, seed, sample, same) < BOUNDARY


@pytest.fixture(scope="module")
def boundaries(qwen3_folder: Path) -> BoundaryDraws:
    return BoundaryDraws(qwen3_folder)


def test_a_draw_at_a_bound_is_known_as_one(boundaries: BoundaryDraws) -> None:
    prompt = random_tokens(1, 5)
    distances = [boundaries.distance(prompt, seed, 0, 0) for seed in range(50)]
    # V bounds in [0, 1]: near ones are there, and far ones too.
    assert min(distances) < BOUNDARY < max(distances)


def test_a_known_prompt_gives_the_same_bits(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder)
    for adapter in (BASE_MODEL, ALL):
        for n in (1, 2, 16, 17, 100, CHUNK_TOKENS + 1, CHUNK_TOKENS + 77):
            wish: dict[str, Any] = {"prompt": random_tokens(n, n), "adapter": adapter, "seed": n}
            first, again = (sampler.generate(**wish, num_samples=3) for _ in range(2))
            assert bits(first) == bits(again)
            assert first.prompt_cache_hit_tokens == 0
            assert again.prompt_cache_hit_tokens == n - 1


def test_requests_that_come_together_give_the_bits_of_one_alone(qwen3_folder: Path) -> None:
    prompt = random_tokens(3, CHUNK_TOKENS + 90)
    alone = [make_sampler(qwen3_folder).generate(prompt, seed=seed) for seed in range(4)]
    group = make_sampler(qwen3_folder)
    numbers = [group.submit(prompt, seed=seed) for seed in range(4)]
    together = [group.answer(number) for number in numbers]
    assert [bits(g) for g in together] == [bits(g) for g in alone]
    assert [g.prompt_cache_hit_tokens for g in together] == [0, *[len(prompt) - 1] * 3]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 3), st.integers(1, 700), st.integers(0, 200), st.integers(0, 99))
def test_a_known_beginning_gives_what_the_whole_gives(
    sampler: SamplerEngine,
    fresh: SamplerEngine,
    boundaries: BoundaryDraws,
    text: int,
    known: int,
    rest: int,
    seed: int,
) -> None:
    prompt = random_tokens(text, 700)[:known] + random_tokens(100 + seed, rest)
    ours = sampler.generate(prompt, num_samples=2, seed=seed)
    whole = fresh.generate(prompt, num_samples=2, seed=seed, prompt_logprobs=True)
    assert whole.prompt_cache_hit_tokens == 0
    boundaries.assert_same(ours, whole, prompt, seed=seed)


def test_a_conversation_goes_on_from_what_was_generated(
    qwen3_folder: Path, boundaries: BoundaryDraws
) -> None:
    sampler = SamplerEngine(qwen3_folder)
    history = random_tokens(5, 30)
    for turn in range(4):
        ours = sampler.generate(history, seed=turn, max_tokens=40)
        whole = SamplerEngine(qwen3_folder).generate(history, seed=turn, max_tokens=40)
        boundaries.assert_same(ours, whole, history, seed=turn)
        if turn:  # all but what was added, the last token that was drawn, and part of a block
            assert ours.prompt_cache_hit_tokens > len(history) - 12 - BLOCK_TOKENS
        history += [*ours.continuations[0].tokens.tolist(), *random_tokens(turn, 10)]


def test_sequences_sent_away_come_back_with_the_same_samples(
    qwen3_folder: Path, boundaries: BoundaryDraws
) -> None:
    prompts = [random_tokens(i, 40) for i in range(5)]
    tight = SamplerEngine(qwen3_folder, kv_cache_tokens=320)
    numbers = [
        tight.submit(prompt, max_tokens=100, seed=i, num_samples=2, stream=i == 2)
        for i, prompt in enumerate(prompts)
    ]
    for i, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
        whole = SamplerEngine(qwen3_folder).generate(prompt, max_tokens=100, seed=i, num_samples=2)
        ours = tight.answer(number)
        if i == 2:
            ours = Generated(continuations=joined(tight.parts[number]))
        boundaries.assert_same(ours, whole, prompt, seed=i)


def test_a_cache_that_gives_all_back_it_can_changes_no_bit(qwen3_folder: Path) -> None:
    prompts = [random_tokens(20 + i, n) for i, n in enumerate((3, 40, CHUNK_TOKENS + 50, 300))]
    wishes = [
        {"prompt": prompt, "max_tokens": 40, "num_samples": 3, "seed": i}
        for i, prompt in enumerate(prompts)
    ]
    whole, sparing = SamplerEngine(qwen3_folder), SamplerEngine(qwen3_folder)
    expected = [bits(whole.generate(**wish)) for wish in wishes]  # type: ignore[arg-type]
    assert sparing.engine.sparing
    for _ in range(2):  # nothing is found again
        numbers = [sparing.submit(**wish) for wish in wishes]  # type: ignore[arg-type]
        while sparing.engine.busy:
            sparing.engine.sparing.spare(0)
            sparing.step()
        assert [bits(sparing.answer(number)) for number in numbers] == expected
        sparing.engine.sparing.spare(0)


def joined(parts: list[SamplePart]) -> tuple[Continuation, ...]:
    """The continuations that the parts add up to. Nothing comes after a stop reason."""
    samples: dict[int, list[SamplePart]] = {}
    for part in parts:
        own = samples.setdefault(part.sample, [])
        assert not own or own[-1].stop_reason is None
        own.append(part)
    whole = []
    for _, own in sorted(samples.items()):
        reason = own[-1].stop_reason
        assert reason is not None
        whole.append(
            Continuation(
                tokens=np.array([t for part in own for t in part.tokens], np.int64),
                logprobs=np.array([x for part in own for x in part.logprobs], np.float32),
                model_logprobs=np.array(
                    [x for part in own for x in part.model_logprobs], np.float32
                ),
                stop_reason=reason,
            )
        )
    return tuple(whole)


@pytest.mark.parametrize("others", [0, 6])
def test_a_stream_adds_up_to_the_whole_answer(qwen3_folder: Path, others: int) -> None:
    wish: dict[str, Any] = {
        "prompt": random_tokens(6, 70),
        "adapter": ALL,
        "num_samples": 3,
        "max_tokens": 20,
        "seed": 11,
        "temperature": 0.8,
        "stops": Stops(token_ids=frozenset(range(100, 140))),
    }
    whole = make_sampler(qwen3_folder).generate(**wish)
    busy = make_sampler(qwen3_folder)
    for i in range(others):
        busy.submit(random_tokens(i, 90 * i + 3), adapter=(BASE_MODEL, ALL)[i % 2], max_tokens=15)
    number = busy.submit(**wish, stream=True)
    answer = busy.answer(number)
    assert answer.continuations == ()
    parts = busy.parts[number]
    assert bits(Generated(continuations=joined(parts))) == bits(whole)
    assert [part.sample for part in parts[:4]] == [0, 1, 2, 0], "samples go on side by side"
    assert len({c.stop_reason for c in whole.continuations}) == 2, "both ends are seen"


def test_an_aborted_stream_says_nothing_more(sampler: SamplerEngine) -> None:
    number = sampler.submit(random_tokens(7, 20), max_tokens=50, stream=True)
    for _ in range(5):
        sampler.step()
    told = len(sampler.parts[number])
    assert told
    sampler.abort(number)
    assert not sampler.engine.busy
    sampler.drain()
    assert len(sampler.parts[number]) == told


def test_a_stream_of_broken_weights_tells_no_token(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder)
    bad = "mint://r-9/sampler_weights/bad@1"
    huge = {name: array * np.float32(1e30) for name, array in sampler.arrays[ALL].items()}
    spec = sampler.row(ALL).spec
    sampler.load_arrays(bad, spec, huge)
    number = sampler.submit(random_tokens(4, 30), adapter=bad, stream=True)
    with pytest.raises(FailedPrecondition, match="are not finite"):
        sampler.answer(number)
    assert number not in sampler.parts


@pytest.mark.parametrize("other", [{"adapter": BASE_MODEL}, {"tenant": "another"}])
def test_nothing_is_found_under_another_adapter_or_tenant(
    qwen3_folder: Path, other: dict[str, str]
) -> None:
    sampler = make_sampler(qwen3_folder)
    prompt = random_tokens(8, 100)
    sampler.generate(prompt, adapter=ALL)
    wish: dict[str, Any] = {"adapter": ALL, **other}
    assert sampler.generate(prompt, **wish).prompt_cache_hit_tokens == 0


def test_a_revision_that_comes_back_finds_its_blocks(qwen3_folder: Path) -> None:
    sampler = make_sampler(qwen3_folder)
    prompt = random_tokens(8, 100)
    first = sampler.generate(prompt, adapter=ALL)
    sampler.engine.accept(0, DropAdapter(ALL))
    sampler.load(ALL, LoraRequest(rank=8), random=0)
    again = sampler.generate(prompt, adapter=ALL)
    assert again.prompt_cache_hit_tokens == 99
    assert bits(first) == bits(again)


def test_scored_positions_are_computed(sampler: SamplerEngine) -> None:
    prompt = random_tokens(9, CHUNK_TOKENS + 50)
    sampler.generate(prompt)
    first, again = (sampler.generate(prompt, prompt_logprobs=True) for _ in range(2))
    assert first.prompt_cache_hit_tokens == again.prompt_cache_hit_tokens == 0
    assert first.prompt_logprobs is not None
    assert again.prompt_logprobs is not None
    assert first.prompt_logprobs.tobytes() == again.prompt_logprobs.tobytes()


def test_a_request_whose_turn_does_not_come_in_time_is_told_so(qwen3_folder: Path) -> None:
    sampler = SamplerEngine(qwen3_folder, max_running_samples=1)
    running = sampler.submit(random_tokens(1, 10), max_tokens=30)
    late = sampler.submit(random_tokens(2, 10), start_within_s=0)
    patient = sampler.submit(random_tokens(3, 10), start_within_s=1000)
    with pytest.raises(WaitedTooLong, match="for its first pass"):
        sampler.answer(late)
    assert len(sampler.answer(running).continuations[0].tokens) == 30
    assert len(sampler.answer(patient).continuations[0].tokens) == 8
    assert not sampler.engine.busy


def test_a_request_that_has_begun_is_not_refused_for_waiting(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = SamplerEngine(qwen3_folder)
    number = sampler.submit(random_tokens(1, 10), max_tokens=100, start_within_s=1000)
    sampler.step()
    late_s = time.monotonic() + 1001
    monkeypatch.setattr(time, "monotonic", lambda: late_s)
    for _ in range(3):
        sampler.submit(random_tokens(2, 10))
        sampler.step()
    assert len(sampler.answer(number).continuations[0].tokens) == 100
    sampler.drain()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_samples_end_where_the_decoded_text_first_holds_a_stop(
    sampler: SamplerEngine, tokenizer: Any, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 5))
    prompt = random_tokens(12, 10)
    free = sampler.generate(prompt, seed=seed, max_tokens=25).continuations[0].tokens.tolist()
    text = tokenizer.decode(free)
    at = data.draw(st.integers(0, len(text) - 1))
    stop = text[at : at + data.draw(st.integers(1, 8))]
    texts = [n for n in range(1, 26) if stop in tokenizer.decode(free[:n])]
    number = sampler.submit(
        prompt, seed=seed, max_tokens=25, stops=Stops(texts=(stop,)), stream=True
    )
    sampler.answer(number)
    (ended,) = joined(sampler.parts[number])
    if "\ufffd" in stop:  # no text, but the trace of bytes that are none
        return
    assert ended.tokens.tolist() == free[: texts[0]]
    assert ended.stop_reason == StopReason.STOP


@pytest.fixture(scope="module")
def tokenizer(qwen3_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(qwen3_folder)

"""Constrained sequences in the engine, against transformers' forward with all matches written out,
and beside others.
"""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_core.errors import InvalidRequest
from sampler_service.engine.drawing.constraint_compiler import (
    CompiledConstraint,
    ConstraintCompiler,
)
from sampler_service.engine.drawing.stop import Vocabulary
from sampler_service.jobs import Constraint, Generated, StopReason, Stops
from tests.models import VOCABULARY_SIZE
from tests.sampler_in_process import SamplerEngine

TOLERANCE = 1e-5
LIMIT_S = 60.0
END = Stops(token_ids=frozenset({2}))
PROMPT = [40, 41, 42, 43, 44]
DATE = "[0-9]{4}-(0[1-9]|1[0-2])-[0-9]{2}"
LONG = "([a-f]{3} [0-9]{2}\n){12}"


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path) -> SamplerEngine:
    return SamplerEngine(qwen3_folder)


@pytest.fixture(scope="module")
def vocabulary(qwen3_folder: Path) -> Vocabulary:
    return Vocabulary(AutoTokenizer.from_pretrained(qwen3_folder))


def constrained(regex: str, **wishes: Any) -> dict[str, Any]:
    constraint = Constraint("regex", "sampling_params.regex", regex)
    return {"max_tokens": 120, "stops": END, **wishes, "constraint": constraint}


def texts_of(generated: Generated, vocabulary: Vocabulary) -> list[str]:
    """Texts without the tokens that ended them."""
    return [
        b"".join(map(vocabulary.bytes_of, c.tokens.tolist()[:-1])).decode()
        for c in generated.continuations
    ]


def test_the_likeliest_tokens_that_match_are_taken_and_logprobs_are_of_all(
    sampler: SamplerEngine, vocabulary: Vocabulary, qwen3_folder: Path
) -> None:
    matches = [f"{a}{b}".encode() for a in ("ab", "b", "one two") for b in ("", "!", "??")]
    regex = "(ab|b|one two)(!|\\?\\?)?"
    (sample,) = sampler.generate(PROMPT, **constrained(regex, temperature=0)).continuations

    ids = set(range(VOCABULARY_SIZE)) - vocabulary.special_ids
    spelled = {i: text for i in ids if (text := vocabulary.bytes_of(i))}
    model = AutoModelForCausalLM.from_pretrained(qwen3_folder, dtype=torch.float32)
    tokens, text = list(PROMPT), b""
    for token, logprob in zip(sample.tokens.tolist(), sample.logprobs.tolist(), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        fits = [i for i, t in spelled.items() if any(m.startswith(text + t) for m in matches)]
        fits += [2] if text in matches else []
        assert token == max(fits, key=lambda i: float(logprobs[i]))
        assert abs(logprob - float(logprobs[token])) < TOLERANCE
        tokens.append(token)
        text += vocabulary.bytes_of(token) if token != 2 else b""
    assert text in matches
    assert sample.stop_reason is StopReason.STOP


def test_each_sample_matches_whatever_else_narrows_it(
    sampler: SamplerEngine, vocabulary: Vocabulary
) -> None:
    narrowed = ({}, {"top_k": 1}, {"top_p": 0.3, "min_p": 0.1}, {"repetition_penalty": 50.0})
    for choice in narrowed:
        wish = constrained(DATE, num_samples=4, temperature=2.0, **choice)
        generated = sampler.generate(PROMPT, **wish)
        assert all(re.fullmatch(DATE, text) for text in texts_of(generated, vocabulary))
        assert {c.stop_reason for c in generated.continuations} == {StopReason.STOP}
    free = sampler.generate(PROMPT, **constrained(DATE, num_samples=4, seed=1))
    assert len(set(texts_of(free, vocabulary))) > 1


def test_constrained_and_free_sequences_run_together_and_change_nothing_for_each_other(
    sampler: SamplerEngine, vocabulary: Vocabulary
) -> None:
    wishes: list[dict[str, Any]] = [
        constrained(DATE, seed=1, num_samples=2),
        {"seed": 2, "num_samples": 3, "max_tokens": 60},
        constrained(LONG, seed=3),
        {"seed": 4, "max_tokens": 60, "top_p": 0.5, "frequency_penalty": 0.5},
    ]
    alone = [sampler.generate(PROMPT, **wish) for wish in wishes]
    numbers = [sampler.submit(PROMPT, **wish) for wish in wishes]
    together = [sampler.answer(number) for number in numbers]
    for left, right in zip(alone, together, strict=True):
        for a, b in zip(left.continuations, right.continuations, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.logprobs.tobytes() == b.logprobs.tobytes()
    assert re.fullmatch(LONG, texts_of(together[2], vocabulary)[0])


def test_another_engine_and_a_sequence_sent_away_give_the_same_tokens(
    sampler: SamplerEngine, qwen3_folder: Path
) -> None:
    wishes = [constrained(LONG, seed=seed) for seed in range(5)]
    expected = [sampler.generate(PROMPT, **wish) for wish in wishes]
    other = SamplerEngine(qwen3_folder, kv_cache_tokens=256)  # too few for all: some must wait
    numbers = [other.submit(PROMPT, **wish) for wish in wishes]
    for left, number in zip(expected, numbers, strict=True):
        right = other.answer(number)
        assert left.continuations[0].tokens.tolist() == right.continuations[0].tokens.tolist()


def test_texts_and_lengths_may_end_a_sample_before_it_matches(sampler: SamplerEngine) -> None:
    cut = sampler.generate(PROMPT, **constrained(LONG, max_tokens=5)).continuations[0]
    assert (cut.stop_reason, len(cut.tokens)) == (StopReason.LENGTH, 5)
    stops = Stops(token_ids=END.token_ids, texts=("\n",))
    stopped = sampler.generate(PROMPT, **constrained(LONG, stops=stops)).continuations[0]
    assert stopped.stop_reason is StopReason.STOP
    assert stopped.tokens[-1] != 2


def test_a_constraint_that_cannot_be_followed_fails_its_own_request_alone(
    sampler: SamplerEngine,
) -> None:
    neighbour = {"seed": 5, "max_tokens": 20}
    expected = sampler.generate(PROMPT, **neighbour)
    bad, good = sampler.submit(PROMPT, **constrained("(")), sampler.submit(PROMPT, **neighbour)
    with pytest.raises(InvalidRequest, match="unclosed group"):
        sampler.answer(bad)
    right = sampler.answer(good)
    assert right.continuations[0].tokens.tolist() == expected.continuations[0].tokens.tolist()
    assert not sampler.engine.busy


@pytest.fixture
def held_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets constraints be compiled from when it is set."""
    compile_now, free = ConstraintCompiler.compile, threading.Event()

    def held(compiler: ConstraintCompiler, *asked: object) -> CompiledConstraint:
        free.wait(LIMIT_S)
        return compile_now(compiler, *asked).result(LIMIT_S)

    def compile_later(compiler: ConstraintCompiler, *asked: object) -> Future[CompiledConstraint]:
        return thread.submit(held, compiler, *asked)

    with ThreadPoolExecutor(1) as thread:
        monkeypatch.setattr(ConstraintCompiler, "compile", compile_later)
        yield free
        free.set()


def test_while_a_constraint_is_compiled_others_go_on(
    sampler: SamplerEngine, vocabulary: Vocabulary, held_compiler: threading.Event
) -> None:
    slow = sampler.submit(PROMPT, **constrained(DATE))
    assert len(sampler.generate(PROMPT, max_tokens=20).continuations[0].tokens) == 20
    assert sampler.engine.busy
    held_compiler.set()
    assert re.fullmatch(DATE, texts_of(sampler.answer(slow), vocabulary)[0])


def test_a_tenants_hard_constraints_keep_no_other_tenant_waiting(sampler: SamplerEngine) -> None:
    slow = '{"type": "integer", "multipleOf": 99991}'  # half a second to try, and again to compile
    hard = {"stops": END, "constraint": Constraint("json_schema", "json_schema", slow)}
    flood = [sampler.submit(PROMPT, tenant="a", **hard) for _ in range(2)]  # type: ignore[arg-type]
    sampler.generate(PROMPT, tenant="b", **constrained("ab"))
    assert flood[-1] not in sampler.answered
    for number in flood:
        sampler.abort(number)


def test_a_request_that_is_left_while_it_waits_for_its_constraint_is_forgotten(
    sampler: SamplerEngine, held_compiler: threading.Event
) -> None:
    sampler.abort(sampler.submit(PROMPT, **constrained(DATE)))
    assert not sampler.engine.busy
    held_compiler.set()


def test_where_a_constraint_leads_no_further_its_request_fails_alone(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spell = Vocabulary.bytes_of  # a model that has no token for "!"
    monkeypatch.setattr(
        Vocabulary,
        "bytes_of",
        lambda v, i: spell(v, i).replace(b"!", b"") if i > 2 else spell(v, i),
    )
    sampler = SamplerEngine(qwen3_folder)
    neighbour = {"seed": 5, "max_tokens": 20, "num_samples": 2}
    expected = sampler.generate(PROMPT, **neighbour)
    stuck = sampler.submit(PROMPT, **constrained("[ab]{3}!", num_samples=3))
    beside = sampler.submit(PROMPT, **neighbour)
    with pytest.raises(InvalidRequest, match="no token of this model leads on"):
        sampler.answer(stuck)
    tokens = [c.tokens.tolist() for c in sampler.answer(beside).continuations]
    assert tokens == [c.tokens.tolist() for c in expected.continuations]
    assert not sampler.engine.busy
    assert np.isfinite(sampler.generate(PROMPT).continuations[0].logprobs).all()

"""Sampling and scoring over the contract: a real service and the generated stubs."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mintrpc.v1 import sampler_pb2
from tests.models import CONTEXT_LENGTH
from tests.samplers import (
    PROMPT,
    Sampler,
    connected,
    refusal,
    tokens_of,
)
from tests.servers import running_sampler


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    store = tmp_path_factory.mktemp("store")
    with (
        running_sampler(qwen3_folder, store, base_model_name="tiny") as service,
        connected(service, store) as sampler,
    ):
        yield sampler


@pytest.fixture(scope="module")
def tokenizer(qwen3_folder: Path) -> object:
    return AutoTokenizer.from_pretrained(qwen3_folder)


def test_samples_carry_tokens_logprobs_and_why_they_ended(sampler: Sampler) -> None:
    response = sampler.sample(num_samples=3, params={"max_tokens": 5})
    assert response.seed == 1
    for sequence in response.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == len(sequence.model_logprobs) == 5
        assert list(sequence.logprobs) == list(sequence.model_logprobs)  # temperature 1
        assert sequence.stop_reason == sampler_pb2.STOP_REASON_LENGTH
        assert sequence.revision_path == ""
    assert len({tuple(t) for t in tokens_of(response)}) == 3
    assert not response.prompt_logprobs
    assert not response.topk_prompt_logprobs


def test_a_seed_repeats_and_the_drawn_one_is_told(sampler: Sampler) -> None:
    first = sampler.sample(num_samples=2, params={"seed": None, "temperature": 0.8})
    again = sampler.sample(num_samples=2, params={"seed": first.seed, "temperature": 0.8})
    assert again.sequences == first.sequences
    other = sampler.sample(num_samples=2, params={"seed": first.seed + 1, "temperature": 0.8})
    assert tokens_of(other) != tokens_of(first)


def test_greedy_equals_transformers(sampler: Sampler, qwen3_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(qwen3_folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    whole = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)[0].tolist()
    response = sampler.sample(params={"temperature": 0.0, "max_tokens": 16})
    assert tokens_of(response) == [whole[len(PROMPT) :]]


@pytest.mark.parametrize("at", [0, 4])
def test_stop_tokens_are_included_and_end_the_sample(sampler: Sampler, at: int) -> None:
    free = tokens_of(sampler.sample(params={"max_tokens": 12}))[0]
    (sequence,) = sampler.sample(params={"max_tokens": 12, "stop_token_ids": [free[at]]}).sequences
    assert list(sequence.tokens) == free[: free.index(free[at]) + 1]
    assert sequence.stop_reason == sampler_pb2.STOP_REASON_STOP


def test_a_stop_text_that_spans_tokens_ends_at_the_token_that_completes_it(
    sampler: Sampler, tokenizer: object
) -> None:
    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens))  # type: ignore[attr-defined]

    for seed in range(50):
        free = tokens_of(sampler.sample(params={"max_tokens": 12, "seed": seed}))[0]
        # The end of the third token's text and the beginning of the fourth's.
        stop = text(free[2:3])[-1:] + text(free[3:4])[:1]
        if "\ufffd" not in text(free[:6]) and len(stop) == 2 and stop not in text(free[:3]):
            break
    params = {"max_tokens": 12, "seed": seed, "stop": ["never said", stop]}
    (sequence,) = sampler.sample(params=params).sequences
    assert list(sequence.tokens) == free[:4]
    assert sequence.stop_reason == sampler_pb2.STOP_REASON_STOP


def test_end_of_sequence_ends_unless_it_is_ignored(sampler: Sampler) -> None:
    (eos,) = sampler.model.eos_token_ids
    params = {"max_tokens": 200, "ignore_eos": False}
    ended = sampler.sample(num_samples=20, params=params).sequences
    free = sampler.sample(num_samples=20, params={**params, "ignore_eos": True}).sequences
    stopped = [s.stop_reason == sampler_pb2.STOP_REASON_STOP for s in ended]
    assert any(stopped)  # one token of 512: each has a third of a chance
    assert not all(stopped)
    for left, right, stops in zip(ended, free, stopped, strict=True):
        assert len(right.tokens) == 200
        assert list(right.tokens[: len(left.tokens)]) == list(left.tokens)
        assert eos not in left.tokens[:-1]
        assert (left.tokens[-1] == eos) == stops


def test_max_tokens_left_out_is_the_rest_of_the_context(sampler: Sampler) -> None:
    prompt = tuple(np.random.default_rng(0).integers(3, 512, CONTEXT_LENGTH - 5).tolist())
    (sequence,) = sampler.sample(prompt, params={"max_tokens": None}).sequences
    assert len(sequence.tokens) == 5
    assert sequence.stop_reason == sampler_pb2.STOP_REASON_LENGTH


def test_prompt_logprobs_start_with_nan_and_equal_compute_logprobs(sampler: Sampler) -> None:
    response = sampler.sample(include_prompt_logprobs=True, topk_prompt_logprobs=3)
    scores = list(response.prompt_logprobs)
    assert np.isnan(scores[0])
    assert len(scores) == len(PROMPT)
    assert sampler.logprobs(PROMPT)[1:] == scores[1:]
    first, *tops = response.topk_prompt_logprobs
    assert not first.token_ids
    for token, score, top in zip(PROMPT[1:], scores[1:], tops, strict=True):
        assert len(top.token_ids) == 3
        assert list(top.logprobs) == sorted(top.logprobs, reverse=True)
        assert top.logprobs[0] >= score or token in top.token_ids
    assert np.isnan(sampler.logprobs(PROMPT[:1])).tolist() == [True]


def test_sampled_logprobs_are_what_the_prompt_would_score(sampler: Sampler) -> None:
    path = sampler.publish("r-score", seed=5)
    (sequence,) = sampler.sample(model_path=path, params={"temperature": 0.6}).sequences
    scores = sampler.logprobs((*PROMPT, *sequence.tokens), model_path=path)
    np.testing.assert_allclose(sequence.model_logprobs, scores[len(PROMPT) :], atol=1e-5)
    assert list(sequence.logprobs) != list(sequence.model_logprobs)


def test_bad_fields_are_refused(sampler: Sampler) -> None:
    code, message, info = refusal(lambda: sampler.sample((5, 512)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt.chunks[0].encoded_text.tokens[1]" in message
    assert info.metadata["token_id"] == "512"
    code, message, _ = refusal(lambda: sampler.sample(base_model="huge"))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "'tiny'" in message
    code, message, _ = refusal(lambda: sampler.sample(params={"min_p": 1.1}))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "min_p" in message

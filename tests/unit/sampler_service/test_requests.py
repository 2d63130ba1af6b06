"""Requests that can never work are refused by the field's name, and others are filled in."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import BaseModelNotFound, InvalidRequest, MintError, Unimplemented
from mintrpc.v1 import sampler_pb2, types_pb2
from sampler_service.jobs import Choice
from sampler_service.requests import (
    parse_compute_logprobs,
    parse_sample,
    parse_stream_sample,
)

MODEL = ModelDescription(
    name="tiny",
    folder="/model",
    context_length=16,
    vocabulary_size=100,
    max_lora_rank=8,
    fingerprint="f",
    dtype="float32",
    device="cpu",
    eos_token_ids=(2, 3),
    bitwise_reproducible=True,
    linear_modules=("lm_head",),
    memory_bytes=0,
)
PATH = "mint://r-1/sampler_weights/a"


def text(*tokens: int) -> types_pb2.ModelInputChunk:
    return types_pb2.ModelInputChunk(encoded_text=types_pb2.EncodedTextChunk(tokens=tokens))


def sample(prompt: tuple[int, ...] = (5, 6, 7), **fields: object) -> sampler_pb2.SampleRequest:
    """A legal request, with fields of SampleRequest or of its SamplingParams set."""
    request = sampler_pb2.SampleRequest(prompt=types_pb2.ModelInput(chunks=[text(*prompt)]))
    own = {k: v for k, v in fields.items() if k in request.DESCRIPTOR.fields_by_name}
    params = sampler_pb2.SamplingParams(**{k: v for k, v in fields.items() if k not in own})  # type: ignore[arg-type]
    request.MergeFrom(sampler_pb2.SampleRequest(sampling_params=params, **own))  # type: ignore[arg-type]
    return request


def targets(ids: object, dtype: str = "<i8") -> types_pb2.TensorData:
    array = np.array(ids, dtype)
    wire = types_pb2.TENSOR_DTYPE_INT64 if dtype == "<i8" else types_pb2.TENSOR_DTYPE_FLOAT32
    return types_pb2.TensorData(dtype=wire, shape=array.shape, values=array.tobytes())


def test_what_is_left_out_gets_its_default() -> None:
    parsed = parse_sample(sample(), MODEL)
    assert parsed.prompt.tolist() == [5, 6, 7]
    assert (parsed.model_path, parsed.num_samples, parsed.max_tokens) == ("", 1, 13)
    assert parsed.choice == Choice(seed=parsed.choice.seed)
    assert parsed.stops.token_ids == {2, 3}
    assert not parsed.prompt_logprobs
    assert parse_sample(sample(), MODEL).choice.seed != parsed.choice.seed


def test_everything_that_is_set_arrives() -> None:
    parsed = parse_sample(
        sample(
            model_path=PATH,
            base_model="tiny",
            num_samples=4,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=5,
            topk_sample_logprobs=6,
            prompt_logprobs_last_n=2,
            prompt_alt_tokens_k=3,
            target_prompt_logprobs=targets([[8, -1], [9, 99]]),
            max_tokens=9,
            temperature=0.5,
            top_k=7,
            top_p=0.9,
            min_p=0.05,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=2,
            seed=-11,
            stop=["a", "b"],
            stop_token_ids=[8],
        ),
        MODEL,
    )
    assert (parsed.model_path, parsed.num_samples, parsed.max_tokens) == (PATH, 4, 9)
    assert parsed.choice == Choice(
        seed=-11,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
    )
    assert parsed.stops.token_ids == {2, 3, 8}
    assert parsed.stops.texts == ("a", "b")
    assert parsed.prompt_logprobs
    assert parsed.topk_prompt_logprobs == 5
    assert parsed.topk_sample_logprobs == 6
    assert parsed.scored_tokens == 2
    assert parsed.prompt_alternatives == 3
    assert parsed.target_prompt_tokens is not None
    assert parsed.target_prompt_tokens.tolist() == [[8, -1], [9, 99]]


def test_zero_is_a_seed_and_a_temperature() -> None:
    choice = parse_sample(sample(seed=0, temperature=0.0), MODEL).choice
    assert (choice.seed, choice.temperature) == (0, 0.0)


def test_without_eos_only_the_callers_stops_end() -> None:
    assert not parse_sample(sample(ignore_eos=True), MODEL).stops.token_ids
    stops = parse_sample(sample(ignore_eos=True, stop_token_ids=[8]), MODEL).stops
    assert stops.token_ids == {8}


def test_chunks_are_read_one_after_the_other() -> None:
    request = sample()
    request.prompt.chunks.append(text(8, 9))
    assert parse_sample(request, MODEL).prompt.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        (sample(prompt=()), "prompt", "at least one token"),
        (sample((5, 100)), "prompt.chunks[0].encoded_text.tokens[1]", "0 to 99"),
        (sample((-1,)), "prompt.chunks[0].encoded_text.tokens[0]", "is -1"),
        (sample((1,) * 17), "prompt", "context holds 16"),
        (sample((1,) * 16), "prompt", "has 16 tokens and the context holds 16, so no room is left"),
        (sample((1,) * 16, max_tokens=1), "prompt", "no room is left"),
        (sample(stop=["\u00e9" * 500] * 17), "sampling_params.stop", "17000 bytes in all but at"),
        (sample(max_tokens=14), "sampling_params.max_tokens", "3 tokens"),
        (sample(max_tokens=0), "sampling_params.max_tokens", "at least 1"),
        (sample(max_tokens=-5), "sampling_params.max_tokens", "is -5"),
        (sample(num_samples=-1), "num_samples", "0 to 1024"),
        (sample(num_samples=1025), "num_samples", "0 to 1024"),
        (sample(topk_sample_logprobs=65), "topk_sample_logprobs", "0 to 64"),
        (sample(prompt_alt_tokens_k=65), "prompt_alt_tokens_k", "0 to 64"),
        (sample(prompt_logprobs_last_n=3), "prompt_logprobs_last_n", "leave it out"),
        (
            sample(prompt_logprobs_last_n=-1, include_prompt_logprobs=True),
            "prompt_logprobs_last_n",
            "at least 0",
        ),
        (
            sample(target_prompt_logprobs=targets([[1], [2], [3]])),
            "target_prompt_logprobs",
            "[2, k]",
        ),
        (sample(target_prompt_logprobs=targets([1, 2])), "target_prompt_logprobs", "[2, k]"),
        (sample(target_prompt_logprobs=targets([[], []])), "target_prompt_logprobs", "[2, k]"),
        (
            sample(target_prompt_logprobs=targets([[1], [100]])),
            "target_prompt_logprobs[1]",
            "is 100",
        ),
        (sample(target_prompt_logprobs=targets([[1], [-2]])), "target_prompt_logprobs[1]", "is -2"),
        (
            sample(target_prompt_logprobs=targets([[1], [2]], "<f4")),
            "target_prompt_logprobs.dtype",
            "INT64",
        ),
        (
            sample(
                target_prompt_logprobs=types_pb2.TensorData(
                    dtype=types_pb2.TENSOR_DTYPE_INT64, shape=(2, 1), values=b"123"
                )
            ),
            "target_prompt_logprobs.values",
            "3 bytes",
        ),
        (sample(min_p=1.1), "sampling_params.min_p", "0 to 1"),
        (sample(min_p=math.nan), "sampling_params.min_p", "is nan"),
        (sample(repetition_penalty=0.0), "sampling_params.repetition_penalty", "0.01 to 100"),
        (sample(presence_penalty=-2.5), "sampling_params.presence_penalty", "-2 to 2"),
        (sample(frequency_penalty=3.0), "sampling_params.frequency_penalty", "-2 to 2"),
        (sample(temperature=-0.1), "sampling_params.temperature", "-0.1"),
        (sample(temperature=1e-9), "sampling_params.temperature", "likeliest token"),
        (sample(temperature=float("nan")), "sampling_params.temperature", "nan"),
        (sample(temperature=float("inf")), "sampling_params.temperature", "finite"),
        (sample(top_k=0), "sampling_params.top_k", "-1 for all"),
        (sample(top_k=-2), "sampling_params.top_k", "is -2"),
        (sample(top_p=0.0), "sampling_params.top_p", "above 0"),
        (sample(top_p=1.1), "sampling_params.top_p", "at most 1"),
        (sample(top_p=float("nan")), "sampling_params.top_p", "nan"),
        (sample(stop=["a", ""]), "sampling_params.stop[1]", "leave it out"),
        (sample(stop_token_ids=[4, 100]), "sampling_params.stop_token_ids[1]", "is 100"),
        (sample(topk_prompt_logprobs=65), "topk_prompt_logprobs", "0 to 64"),
        (sample(topk_prompt_logprobs=-1), "topk_prompt_logprobs", "is -1"),
        (sample(model_path="ckpt_1"), "model_path", "not a checkpoint path"),
        (sample(model_path="mint://r-1/weights/a"), "model_path", "`sampler_weights` is needed"),
        (sample(model_path="mint://r-1/blobs/a"), "model_path", "not a checkpoint path"),
    ],
)
def test_bad_values_are_refused_by_field(
    request_: sampler_pb2.SampleRequest, field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_sample(request_, MODEL)
    assert caught.value.field == field
    assert says in caught.value.message
    assert f"`{field}" in caught.value.message or "prompt" in field


def test_neutral_values_are_taken() -> None:
    parse_sample(
        sample(min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0),
        MODEL,
    )


def test_images_are_unimplemented_and_empty_chunks_are_wrong() -> None:
    request = sample()
    request.prompt.chunks.append(types_pb2.ModelInputChunk(image=types_pb2.ImageChunk(data=b"x")))
    with pytest.raises(Unimplemented, match=r"prompt\.chunks\[1\]\.image"):
        parse_sample(request, MODEL)
    request.prompt.chunks[1].CopyFrom(types_pb2.ModelInputChunk())
    with pytest.raises(InvalidRequest, match=r"prompt\.chunks\[1\]"):
        parse_sample(request, MODEL)


def test_another_base_model_is_not_found_and_the_served_one_is_named() -> None:
    with pytest.raises(BaseModelNotFound, match="this server serves 'tiny'"):
        parse_sample(sample(base_model="huge"), MODEL)


def test_logprobs_are_checked_like_samples() -> None:
    prompt = sample((1,) * 16).prompt
    request = sampler_pb2.ComputeLogprobsRequest(model_path=PATH, prompt=prompt)
    parsed = parse_compute_logprobs(request, MODEL)
    assert (parsed.model_path, parsed.num_samples, len(parsed.prompt)) == (PATH, 0, 16)
    assert parsed.prompt_logprobs
    wrong: list[Callable[[], object]] = [
        lambda: request.prompt.chunks[0].encoded_text.tokens.append(1),
        lambda: request.ClearField("prompt"),
    ]
    for spoil in wrong:
        spoil()
        with pytest.raises(InvalidRequest):
            parse_compute_logprobs(request, MODEL)


def test_a_context_that_memory_bounds_says_so() -> None:
    model = replace(MODEL, memory_bound=True)
    for request in (sample((1,) * 17), sample(max_tokens=14)):
        with pytest.raises(InvalidRequest, match="kv-cache-tokens") as caught:
            parse_sample(request, model)
        assert caught.value.metadata["context_length"] == "16"


def test_a_stream_is_parsed_like_a_sample() -> None:
    request = sample(num_samples=4, max_tokens=9, temperature=0.5, seed=3)
    stream = sampler_pb2.StreamSampleRequest(sample=request)
    asked, expected = parse_stream_sample(stream, MODEL), parse_sample(request, MODEL)
    parsed = asked.sampling
    assert [tokens.tolist() for tokens in asked.received] == [[]] * 4
    assert parsed.prompt.tolist() == expected.prompt.tolist()
    assert replace(parsed, prompt=expected.prompt) == expected
    with pytest.raises(InvalidRequest, match="`sample` is absent"):
        parse_stream_sample(sampler_pb2.StreamSampleRequest(), MODEL)


PATH = "mint://r/sampler_weights/a"


@pytest.mark.parametrize("resuming", [{"request_id": "a"}, {"received": [{"tokens": [1]}]}])
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "sampling_params.seed"),
        ({"seed": 1, "model_path": PATH}, "model_path"),
        ({"seed": 1, "model_path": f"{PATH}@3"}, None),
    ],
)
def test_a_stream_that_goes_on_says_all_that_its_tokens_follow_from(
    resuming: dict[str, object], fields: dict[str, object], field: str | None
) -> None:
    request = sampler_pb2.StreamSampleRequest(sample=sample(**fields), **resuming)  # type: ignore[arg-type]
    if field is None:
        assert parse_stream_sample(request, MODEL).received
        return
    with pytest.raises(InvalidRequest, match="that the stream told") as caught:
        parse_stream_sample(request, MODEL)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("resuming", "field"),
    [
        ({"request_id": "a" * 129}, "request_id"),
        ({"received": [{}] * 3}, "received"),
        ({"received": [{}, {"tokens": [1] * 5}]}, "received[1].tokens"),
    ],
)
def test_a_reader_cannot_have_more_than_the_stream_holds(
    resuming: dict[str, object], field: str
) -> None:
    asked = sample(num_samples=2, max_tokens=4, seed=1)
    with pytest.raises(InvalidRequest) as caught:
        parse_stream_sample(sampler_pb2.StreamSampleRequest(sample=asked, **resuming), MODEL)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    "fields",
    [
        {"include_prompt_logprobs": True},
        {"topk_prompt_logprobs": 2},
        {"topk_sample_logprobs": 2},
        {"prompt_logprobs_last_n": 2},
        {"target_prompt_logprobs": targets([[1], [2]])},
        {"prompt_alt_tokens_k": 2},
    ],
)
def test_a_stream_refuses_what_its_parts_have_no_place_for(fields: dict[str, object]) -> None:
    (name,) = fields
    request = sampler_pb2.StreamSampleRequest(sample=sample(**fields))
    with pytest.raises(InvalidRequest, match=f"`{name}` cannot be asked for in a stream") as caught:
        parse_stream_sample(request, MODEL)
    assert caught.value.field == name


INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 20)
FLOAT = st.floats() | st.sampled_from([0.0, 1.0])


def test_targets_are_taken_as_numbers_too() -> None:
    typed = types_pb2.TensorData(shape=[2, 2], int_values=[1, -1, 2, 3])
    parsed = parse_sample(sample(target_prompt_logprobs=typed), MODEL)
    assert parsed.target_prompt_tokens is not None
    assert parsed.target_prompt_tokens.tolist() == [[1, -1], [2, 3]]


@given(
    st.lists(INT32, max_size=20),
    st.fixed_dictionaries(
        {},
        optional={
            "model_path": st.text(max_size=9) | st.just(PATH),
            "num_samples": INT32,
            "topk_prompt_logprobs": INT32,
            "topk_sample_logprobs": INT32,
            "include_prompt_logprobs": st.booleans(),
            "prompt_logprobs_last_n": INT32,
            "prompt_alt_tokens_k": INT32,
            "target_prompt_logprobs": st.builds(
                types_pb2.TensorData,
                dtype=st.sampled_from([0, 1, 2, 3]),
                shape=st.lists(st.integers(-2, 20), max_size=3),
                values=st.binary(max_size=40),
                float_values=st.lists(st.floats(width=32), max_size=3),
                int_values=st.lists(INT32, max_size=40),
            ),
            "max_tokens": INT32,
            "temperature": FLOAT,
            "top_k": INT32,
            "top_p": FLOAT,
            "seed": st.integers(-(2**63), 2**63 - 1),
            "stop": st.lists(st.text(max_size=3), max_size=2),
            "stop_token_ids": st.lists(INT32, max_size=2),
            "min_p": FLOAT,
            "repetition_penalty": FLOAT,
        },
    ),
)
def test_any_request_is_legal_or_refused(prompt: list[int], fields: dict[str, object]) -> None:
    try:
        parsed = parse_sample(sample(tuple(prompt), **fields), MODEL)
    except MintError:
        return
    assert 1 <= len(parsed.prompt) < len(parsed.prompt) + parsed.max_tokens <= MODEL.context_length
    assert 1 <= parsed.num_samples <= 1024
    assert parsed.choice.temperature >= 0
    assert 0 < parsed.choice.top_p <= 1

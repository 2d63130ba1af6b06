"""Protobuf in, jobs out: all checks that need no state but the base model's description."""

import hashlib
import math
import secrets
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from checkpoint_store import SAMPLER_WEIGHTS, parse_path
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import BaseModelNotFound, InvalidRequest, Unimplemented
from mint_core.rpc.limits import (
    MAX_REQUEST_ID_CHARACTERS,
    MAX_ROUTED_BYTES,
    MAX_SAMPLES_PER_REQUEST,
    MAX_STOP_BYTES,
    MAX_TARGETS,
    MAX_TOPK_LOGPROBS,
)
from mint_core.tensors import read_integers
from mintrpc.v1 import sampler_pb2, types_pb2
from sampler_service.constraint_parsing import parse_constraint
from sampler_service.jobs import Choice, Sampling, Stops, Tokens

PROMPT_SCORES = (
    "include_prompt_logprobs",
    "topk_prompt_logprobs",
    "target_prompt_logprobs",
    "prompt_alt_tokens_k",
)
# A stream holds new tokens and their own logprobs alone.
NOT_STREAMED = (
    *PROMPT_SCORES,
    "prompt_logprobs_last_n",
    "topk_sample_logprobs",
    "include_routed_experts",
)
N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedSampling:
    """What a request for a stream asks for."""

    sampling: Sampling
    request_id: str  # empty: the stream ends with its reader
    content: bytes  # a digest of what is to be sampled
    received: tuple["array[int]", ...]  # what the reader has of each continuation


LEAST_TEMPERATURE = 1e-5  # below it, float32 cannot tell it from 0


def parse_sample(request: sampler_pb2.SampleRequest, model: ModelDescription) -> Sampling:
    """Refuses what can never work, then what this version lacks."""
    model_path, params = _model_path(request, model), request.sampling_params
    prompt = parse_prompt(request.prompt, model)
    stops = _stops(params, model)
    num_samples = _within(request.num_samples, "num_samples", 0, MAX_SAMPLES_PER_REQUEST) or 1
    max_tokens = _max_tokens(params, len(prompt), model)
    if request.include_routed_experts:
        _check_routed(len(prompt) - 1 + num_samples * max_tokens, model)
    return Sampling(
        model_path=model_path,
        prompt=prompt,
        num_samples=num_samples,
        max_tokens=max_tokens,
        choice=_choice(params),
        stops=stops,
        constraint=parse_constraint(params, stops),
        prompt_logprobs=request.include_prompt_logprobs,
        topk_prompt_logprobs=_topk(request.topk_prompt_logprobs, "topk_prompt_logprobs", model),
        target_prompt_tokens=_targets(request, len(prompt), model),
        prompt_alternatives=_topk(request.prompt_alt_tokens_k, "prompt_alt_tokens_k", model),
        scored_tokens=_scored_tokens(request),
        topk_sample_logprobs=_topk(request.topk_sample_logprobs, "topk_sample_logprobs", model),
        routed_experts=request.include_routed_experts,
    )


def parse_stream_sample(
    request: sampler_pb2.StreamSampleRequest, model: ModelDescription
) -> StreamedSampling:
    """As `parse_sample`, whose field names it keeps."""
    sample = request.sample
    if not request.HasField("sample"):
        raise InvalidRequest("`sample` is absent; say what to sample", field="sample")
    for name in NOT_STREAMED:
        if _is_set(sample, name):
            raise InvalidRequest(
                f"`{name}` cannot be asked for in a stream, which holds new tokens and their own "
                "logprobs alone; leave it out, or call `Sample`",
                field=name,
            )
    sampling = parse_sample(sample, model)
    if request.request_id or request.received:
        _check_drawn_again(sample)
    _within(len(request.request_id), "request_id", 0, MAX_REQUEST_ID_CHARACTERS)
    _within(len(request.received), "received", 0, sampling.num_samples)
    received = [array("i", sequence.tokens) for sequence in request.received]
    for i, tokens in enumerate(received):
        _within(len(tokens), f"received[{i}].tokens", 0, sampling.max_tokens)
    received += [array("i") for _ in range(sampling.num_samples - len(received))]
    return StreamedSampling(
        sampling=sampling,
        request_id=request.request_id,
        content=hashlib.sha256(sample.SerializeToString(deterministic=True)).digest(),
        received=tuple(received),
    )


def _check_drawn_again(request: sampler_pb2.SampleRequest) -> None:
    """Refuses what may mean something else the next time."""
    if not request.sampling_params.HasField("seed"):
        raise InvalidRequest(
            "`sampling_params.seed` is absent but `request_id` or `received` is set; give the seed "
            "that the stream told",
            field="sampling_params.seed",
        )
    if request.model_path and parse_path(request.model_path).revision is None:
        raise InvalidRequest(
            f"`model_path` {request.model_path!r} may name another revision by now, but "
            "`request_id` or `received` is set; give the `revision_path` that the stream told",
            field="model_path",
        )


def parse_compute_logprobs(
    request: sampler_pb2.ComputeLogprobsRequest, model: ModelDescription
) -> Sampling:
    """A request that only scores its prompt."""
    return Sampling(
        model_path=_model_path(request, model),
        prompt=parse_prompt(request.prompt, model),
        choice=Choice(seed=0),
        prompt_logprobs=True,
        scored_tokens=_last_n(request.prompt_logprobs_last_n),
    )


def _check_routed(tokens: int, model: ModelDescription) -> None:
    """Refuses to tell the experts of so many tokens where there are none, or too many."""
    field = "include_routed_experts"
    if model.routed is None:
        raise InvalidRequest(
            f"`{field}` is set but {model.name} has no experts; leave it out", field=field
        )
    size_bytes = 2 * tokens * model.routed.layers * model.routed.per_token
    if size_bytes > MAX_ROUTED_BYTES:
        raise InvalidRequest(
            f"`{field}` asks for up to {size_bytes} bytes, of {tokens} tokens, but at most "
            f"{MAX_ROUTED_BYTES} are told in an answer; set `sampling_params.max_tokens`, or ask "
            "for fewer samples",
            field=field,
            size_bytes=size_bytes,
        )


def _scored_tokens(request: sampler_pb2.SampleRequest) -> int | None:
    if request.prompt_logprobs_last_n and not any(_is_set(request, name) for name in PROMPT_SCORES):
        wanted = " or ".join(f"`{name}`" for name in PROMPT_SCORES)
        raise InvalidRequest(
            f"`prompt_logprobs_last_n` is set but no logprobs of the prompt are asked for; ask for "
            f"{wanted}, or leave it out",
            field="prompt_logprobs_last_n",
        )
    return _last_n(request.prompt_logprobs_last_n)


def _last_n(count: int) -> int | None:
    return _within(count, "prompt_logprobs_last_n", 0) or None


def _targets(
    request: sampler_pb2.SampleRequest, prompt_tokens: int, model: ModelDescription
) -> Tokens | None:  # [prompt - 1, k]
    """Tokens to score in place of the prompt's."""
    if not request.HasField("target_prompt_logprobs"):
        return None
    field, tensor = "target_prompt_logprobs", request.target_prompt_logprobs
    shape = tuple(tensor.shape)
    if len(shape) != 2 or shape[0] != prompt_tokens - 1 or shape[1] < 1:
        raise InvalidRequest(
            f"`{field}` has shape {list(shape)} but `prompt` has {prompt_tokens} tokens; give "
            f"[{prompt_tokens - 1}, k] token ids, for each token but the first the k that are to "
            "be scored in its place, -1 for none",
            field=field,
            shape=list(shape),
            prompt_tokens=prompt_tokens,
        )
    if shape[1] > MAX_TARGETS:
        raise InvalidRequest(
            f"`{field}` has {shape[1]} tokens for each place but at most {MAX_TARGETS} are scored; "
            "ask for them in several calls",
            field=field,
            shape=list(shape),
        )
    ids = read_integers(tensor, field)
    _check_token_ids(np.where(ids == -1, 0, ids).ravel(), field, model)
    return ids


def _topk(count: int, field: str, model: ModelDescription) -> int:
    return _within(count, field, 0, min(MAX_TOPK_LOGPROBS, model.vocabulary_size))


def _is_set(request: sampler_pb2.SampleRequest, name: str) -> bool:
    """Whether a field has another value than its default."""
    return any(field.name == name for field, _ in request.ListFields())


def parse_prompt(prompt: types_pb2.ModelInput, model: ModelDescription) -> Tokens:
    """The prompt's tokens, at least one and no more than the context holds."""
    count = sum(len(chunk.encoded_text.tokens) for chunk in prompt.chunks)
    if count > model.context_length:
        raise InvalidRequest(
            f"`prompt` has {count} tokens but {_context_holds(model)}; shorten it",
            field="prompt",
            prompt_tokens=count,
            context_length=model.context_length,
        )
    parts = [
        _chunk_tokens(chunk, f"prompt.chunks[{i}]", model) for i, chunk in enumerate(prompt.chunks)
    ]
    if not count:
        raise InvalidRequest("`prompt` is empty; it needs at least one token", field="prompt")
    return np.concatenate(parts)


def _chunk_tokens(chunk: types_pb2.ModelInputChunk, field: str, model: ModelDescription) -> Tokens:
    match chunk.WhichOneof("chunk"):
        case "encoded_text":
            tokens = np.array(chunk.encoded_text.tokens, np.int64)
            _check_token_ids(tokens, f"{field}.encoded_text.tokens", model)
            return tokens
        case None:
            raise InvalidRequest(
                f"`{field}` is empty; give token ids in `encoded_text`", field=field
            )
        case kind:
            raise Unimplemented(
                f"`{field}.{kind}` is an image, and the served base model reads text alone; "
                "leave images out",
                feature="images",
                field=f"{field}.{kind}",
            )


def _check_token_ids(tokens: Tokens, field: str, model: ModelDescription) -> None:
    wrong = np.flatnonzero((tokens < 0) | (tokens >= model.vocabulary_size))
    if len(wrong):
        token_id = int(tokens[wrong[0]])
        raise InvalidRequest(
            f"`{field}[{wrong[0]}]` is {token_id} but token ids of {model.name} are 0 to "
            f"{model.vocabulary_size - 1}; encode with this model's tokenizer",
            field=f"{field}[{wrong[0]}]",
            token_id=token_id,
        )


def _model_path(
    request: sampler_pb2.SampleRequest | sampler_pb2.ComputeLogprobsRequest,
    model: ModelDescription,
) -> str:
    """Of an adapter, or empty for the base model, which must be the served one."""
    if request.base_model not in ("", model.name):
        raise BaseModelNotFound(request.base_model, model.name)
    if request.model_path:
        parse_path(request.model_path, kind=SAMPLER_WEIGHTS, field="model_path")
    return request.model_path


def _max_tokens(params: sampler_pb2.SamplingParams, prompt: int, model: ModelDescription) -> int:
    rest = model.context_length - prompt
    if not rest:
        raise InvalidRequest(
            f"`prompt` has {prompt} tokens and {_context_holds(model)}, so no room is left for a "
            "continuation; shorten the prompt",
            field="prompt",
            prompt_tokens=prompt,
            context_length=model.context_length,
        )
    name = "sampling_params.max_tokens"
    wanted = params.max_tokens if params.HasField("max_tokens") else rest
    _within(wanted, name, 1)
    if wanted > rest:
        raise InvalidRequest(
            f"`prompt` has {prompt} tokens and `{name}` is {wanted}, but {_context_holds(model)}; "
            "shorten the prompt or ask for fewer tokens",
            field=name,
            prompt_tokens=prompt,
            max_tokens=wanted,
            context_length=model.context_length,
        )
    return wanted


def _context_holds(model: ModelDescription) -> str:
    holds = f"the context holds {model.context_length}"
    if model.memory_bound:
        holds += ", for so many keys and values fit in the server's memory (see --kv-cache-tokens)"
    return holds


def _choice(params: sampler_pb2.SamplingParams) -> Choice:
    presence, frequency = params.presence_penalty, params.frequency_penalty
    repetition = params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
    return Choice(
        seed=params.seed if params.HasField("seed") else secrets.randbits(63),
        temperature=_temperature(params.temperature) if params.HasField("temperature") else 1.0,
        top_k=_top_k(params.top_k) if params.HasField("top_k") else -1,
        top_p=_top_p(params.top_p) if params.HasField("top_p") else 1.0,
        min_p=_within(params.min_p, "sampling_params.min_p", 0, 1),
        repetition_penalty=_within(repetition, "sampling_params.repetition_penalty", 0.01, 100),
        presence_penalty=_within(presence, "sampling_params.presence_penalty", -2, 2),
        frequency_penalty=_within(frequency, "sampling_params.frequency_penalty", -2, 2),
    )


def _temperature(value: float) -> float:
    legal = value == 0 or LEAST_TEMPERATURE <= value < math.inf
    wanted = f"0 for the likeliest token, or finite and at least {LEAST_TEMPERATURE:g}"
    return _legal(value, "sampling_params.temperature", legal, wanted)


def _top_k(value: int) -> int:
    legal = value == -1 or value > 0
    return _legal(value, "sampling_params.top_k", legal, "at least 1, or -1 for all tokens")


def _top_p(value: float) -> float:
    wanted = "above 0 and at most 1; 1 leaves all tokens in"
    return _legal(value, "sampling_params.top_p", 0 < value <= 1, wanted)


def _stops(params: sampler_pb2.SamplingParams, model: ModelDescription) -> Stops:
    ids = np.array(params.stop_token_ids, np.int64)
    _check_token_ids(ids, "sampling_params.stop_token_ids", model)
    for i, text in enumerate(params.stop):
        if not text:
            raise InvalidRequest(
                f"`sampling_params.stop[{i}]` is empty and would end every continuation; leave it "
                "out",
                field=f"sampling_params.stop[{i}]",
            )
    size_bytes = sum(len(text.encode()) for text in params.stop)
    if size_bytes > MAX_STOP_BYTES:  # the engine reads them all before anything else
        raise InvalidRequest(
            f"`sampling_params.stop` has {size_bytes} bytes in all but at most {MAX_STOP_BYTES} "
            "are taken; shorten it",
            field="sampling_params.stop",
            size_bytes=size_bytes,
        )
    ends: Iterable[int] = () if params.ignore_eos else model.eos_token_ids
    return Stops(token_ids=frozenset({*ids.tolist(), *ends}), texts=tuple(params.stop))


def _within(value: N, field: str, least: float, most: float | None = None) -> N:
    legal = value >= least and (most is None or value <= most)
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    return _legal(value, field, legal, wanted)


def _legal(value: N, field: str, legal: bool, wanted: str) -> N:
    """The value, which is refused if it is not legal."""
    if not legal:
        told = f"{value:g}" if isinstance(value, float) else value
        raise InvalidRequest(f"`{field}` is {told} but must be {wanted}", field=field, value=value)
    return value

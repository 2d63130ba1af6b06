"""Answers of the engine, as protobuf."""

import math

import numpy as np

from mintrpc.v1 import sampler_pb2, types_pb2
from sampler_service import jobs

_STOP_REASONS = {
    None: sampler_pb2.STOP_REASON_UNSPECIFIED,
    jobs.StopReason.STOP: sampler_pb2.STOP_REASON_STOP,
    jobs.StopReason.LENGTH: sampler_pb2.STOP_REASON_LENGTH,
}


def sample_response(
    generated: jobs.Generated, seed: int, revision_path: str
) -> sampler_pb2.SampleResponse:
    return sampler_pb2.SampleResponse(
        sequences=[_sequence(c, revision_path) for c in generated.continuations],
        prompt_logprobs=_prompt_logprobs(generated),
        topk_prompt_logprobs=_topk(generated.topk_prompt_logprobs, generated.unscored_tokens),
        target_prompt_logprobs=_rows(generated, generated.target_prompt_logprobs, np.nan),
        prompt_alt_tokens=_alternatives(generated),
        seed=seed,
        prompt_cache_hit_tokens=generated.prompt_cache_hit_tokens,
        prompt_routed_experts=_routed(generated.prompt_routed),
    )


def stream_sample_response(
    part: jobs.SamplePart, offset_tokens: int, seed: int, revision_path: str
) -> sampler_pb2.StreamSampleResponse:
    return sampler_pb2.StreamSampleResponse(
        index=part.sample,
        offset_tokens=offset_tokens,
        tokens=part.tokens,
        logprobs=part.logprobs,
        model_logprobs=part.model_logprobs,
        stop_reason=_STOP_REASONS[part.stop_reason],
        seed=seed,
        revision_path=revision_path,
    )


def compute_logprobs_response(
    generated: jobs.Generated, revision_path: str
) -> sampler_pb2.ComputeLogprobsResponse:
    return sampler_pb2.ComputeLogprobsResponse(
        logprobs=_prompt_logprobs(generated), revision_path=revision_path
    )


def _sequence(continuation: jobs.Continuation, revision_path: str) -> sampler_pb2.SampledSequence:
    return sampler_pb2.SampledSequence(
        tokens=continuation.tokens.tolist(),
        logprobs=continuation.logprobs.tolist(),
        model_logprobs=continuation.model_logprobs.tolist(),
        stop_reason=_STOP_REASONS[continuation.stop_reason],
        revision_path=revision_path,
        topk_logprobs=_topk(continuation.topk_logprobs),
        routed_experts=_routed(continuation.routed),
    )


def _routed(routed: jobs.Routed | None) -> bytes:
    return b"" if routed is None else routed.astype("<u2").tobytes()


def _prompt_logprobs(generated: jobs.Generated) -> list[float]:
    """One entry per prompt token."""
    if generated.prompt_logprobs is None:
        return []
    unscored = [math.nan] * generated.unscored_tokens
    return [*unscored, *generated.prompt_logprobs.tolist()]


def _alternatives(generated: jobs.Generated) -> sampler_pb2.PromptAltTokens | None:
    drawn = generated.prompt_alternatives
    if drawn is None:
        return None
    return sampler_pb2.PromptAltTokens(
        tokens=_rows(generated, drawn.token_ids, -1),
        logprobs=_rows(generated, drawn.logprobs, np.nan),
    )


def _rows(
    generated: jobs.Generated, scored: jobs.Floats | jobs.Tokens | None, unscored: float
) -> types_pb2.TensorData | None:
    """One row per prompt token but the first, in the byte order of the contract."""
    if scored is None:
        return None
    left_out = np.full((generated.unscored_tokens - 1, scored.shape[1]), unscored, scored.dtype)
    values = np.concatenate([left_out, scored])
    is_float = values.dtype.kind == "f"
    return types_pb2.TensorData(
        dtype=types_pb2.TENSOR_DTYPE_FLOAT32 if is_float else types_pb2.TENSOR_DTYPE_INT64,
        shape=values.shape,
        values=values.astype("<f4" if is_float else "<i8").tobytes(),
    )


def _topk(top: jobs.TokenLogprobs | None, unscored: int = 0) -> list[sampler_pb2.TopkLogprobs]:
    """One entry per token; those of the first, unscored ones are empty."""
    if top is None:
        return []
    empty = [sampler_pb2.TopkLogprobs() for _ in range(unscored)]
    return empty + [
        sampler_pb2.TopkLogprobs(token_ids=ids, logprobs=logprobs)
        for ids, logprobs in zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
    ]

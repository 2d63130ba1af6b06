"""Answers of the engine, as protobuf."""

import math

from mintrpc.v1 import sampler_pb2
from sampler_service.jobs import Continuation, Generated, SamplePart, StopReason, TopLogprobs

_STOP_REASONS = {
    None: sampler_pb2.STOP_REASON_UNSPECIFIED,
    StopReason.STOP: sampler_pb2.STOP_REASON_STOP,
    StopReason.LENGTH: sampler_pb2.STOP_REASON_LENGTH,
}


def sample_response(
    generated: Generated, seed: int, revision_path: str
) -> sampler_pb2.SampleResponse:
    return sampler_pb2.SampleResponse(
        sequences=[_sequence(c, revision_path) for c in generated.continuations],
        prompt_logprobs=_prompt_logprobs(generated),
        topk_prompt_logprobs=_topk(generated.topk_prompt_logprobs),
        seed=seed,
        prompt_cache_hit_tokens=generated.prompt_cache_hit_tokens,
    )


def stream_sample_response(
    part: SamplePart, seed: int, revision_path: str
) -> sampler_pb2.StreamSampleResponse:
    return sampler_pb2.StreamSampleResponse(
        index=part.index,
        tokens=part.tokens,
        logprobs=part.logprobs,
        model_logprobs=part.model_logprobs,
        stop_reason=_STOP_REASONS[part.stop_reason],
        seed=seed,
        revision_path=revision_path,
    )


def compute_logprobs_response(
    generated: Generated, revision_path: str
) -> sampler_pb2.ComputeLogprobsResponse:
    return sampler_pb2.ComputeLogprobsResponse(
        logprobs=_prompt_logprobs(generated), revision_path=revision_path
    )


def _sequence(continuation: Continuation, revision_path: str) -> sampler_pb2.SampledSequence:
    return sampler_pb2.SampledSequence(
        tokens=continuation.tokens.tolist(),
        logprobs=continuation.logprobs.tolist(),
        model_logprobs=continuation.model_logprobs.tolist(),
        stop_reason=_STOP_REASONS[continuation.stop_reason],
        revision_path=revision_path,
    )


def _prompt_logprobs(generated: Generated) -> list[float]:
    """One entry per prompt token: the first has no logprob."""
    if generated.prompt_logprobs is None:
        return []
    return [math.nan, *generated.prompt_logprobs.tolist()]


def _topk(top: TopLogprobs | None) -> list[sampler_pb2.TopkLogprobs]:
    if top is None:
        return []
    return [
        sampler_pb2.TopkLogprobs(),
        *(
            sampler_pb2.TopkLogprobs(token_ids=ids, logprobs=logprobs)
            for ids, logprobs in zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
        ),
    ]

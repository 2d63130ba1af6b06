"""What the sampler answers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mint.errors import APIResponseValidationError
from mintrpc.v1 import sampler_pb2

StopReason = Literal["length", "stop"]
Topk = list[tuple[int, float]]  # (token id, logprob), likeliest first

_STOP_REASONS: dict[int, StopReason] = {
    sampler_pb2.STOP_REASON_STOP: "stop",
    sampler_pb2.STOP_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One continuation, with the token that ended it.

    `logprobs` are at the requested temperature, `model_logprobs` at 1: what the trainer computes.
    """

    tokens: list[int]
    logprobs: list[float] | None
    stop_reason: StopReason
    model_logprobs: list[float] | None = None
    revision_path: str = ""  # of the adapter that made it; empty: the base model
    topk_logprobs: list[Topk] | None = None

    @classmethod
    def from_proto(cls, message: sampler_pb2.SampledSequence) -> "SampledSequence":
        return cls(
            tokens=list(message.tokens),
            logprobs=list(message.logprobs),
            stop_reason=_stop_reason(message.stop_reason),
            model_logprobs=list(message.model_logprobs),
            revision_path=message.revision_path,
            topk_logprobs=[_topk(entry) for entry in message.topk_logprobs] or None,
        )


@dataclass(frozen=True, slots=True)
class SamplePart:
    """The next tokens of one continuation; the last part of each has its stop reason."""

    index: int  # which continuation, from 0
    tokens: list[int]
    logprobs: list[float]  # as in SampledSequence, and so are the next
    model_logprobs: list[float]
    stop_reason: StopReason | None = None

    @classmethod
    def from_proto(cls, message: sampler_pb2.StreamSampleResponse) -> "SamplePart":
        ended = message.stop_reason != sampler_pb2.STOP_REASON_UNSPECIFIED
        return cls(
            index=message.index,
            tokens=list(message.tokens),
            logprobs=list(message.logprobs),
            model_logprobs=list(message.model_logprobs),
            stop_reason=_stop_reason(message.stop_reason) if ended else None,
        )


@dataclass(frozen=True, slots=True)
class SampleResponse:
    """The continuations in order, and the seed that makes the same ones again."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[Topk | None] | None = None
    seed: int = 0
    prompt_cache_hit_tokens: int = 0

    @classmethod
    def from_proto(cls, message: sampler_pb2.SampleResponse) -> "SampleResponse":
        topk = [_topk(entry) or None for entry in message.topk_prompt_logprobs]
        return cls(
            sequences=[SampledSequence.from_proto(entry) for entry in message.sequences],
            prompt_logprobs=optional_logprobs(message.prompt_logprobs) or None,
            topk_prompt_logprobs=topk or None,
            seed=message.seed,
            prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
        )


def optional_logprobs(values: Iterable[float]) -> list[float | None]:
    """Logprobs with None where there is none, which the wire writes as NaN."""
    return [None if math.isnan(value) else value for value in values]


def _stop_reason(reason: int) -> StopReason:
    if reason not in _STOP_REASONS:
        raise APIResponseValidationError(
            f"a sequence ended for reason {reason}, unknown to this client"
        )
    return _STOP_REASONS[reason]


def _topk(message: sampler_pb2.TopkLogprobs) -> Topk:
    return list(zip(message.token_ids, message.logprobs, strict=True))

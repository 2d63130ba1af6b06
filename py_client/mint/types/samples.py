"""What the sampler answers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from mint.types._from_proto import known, optional, read
from mint.types.tensor_data import TensorData
from mintrpc.v1 import sampler_pb2

StopReason = Literal["length", "stop"]
Topk = list[tuple[int, float]]  # (token id, logprob), likeliest first
NO_LOGPROB = -99999.0  # as the SDK whose names these are writes it


@dataclass(frozen=True, slots=True)
class TopkLogprobs:
    """The likeliest tokens of each position, likeliest first, as arrays. Where there are none, ids
    are 0 and logprobs NO_LOGPROB.
    """

    token_ids: NDArray[np.int32]  # [positions, k]
    logprobs: NDArray[np.float32]  # [positions, k]

    @classmethod
    def of(cls, entries: Sequence[Topk | None]) -> "TopkLogprobs":
        """Lists as arrays."""
        shape = len(entries), max((len(entry) for entry in entries if entry), default=0)
        arrays = np.zeros(shape, np.int32), np.full(shape, NO_LOGPROB, np.float32)
        for row, entry in enumerate(entries):
            if entry:
                arrays[0][row], arrays[1][row] = zip(*entry, strict=True)
        return cls(*arrays)


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One continuation, with the token that ended it.

    `logprobs` are at the requested temperature, `model_logprobs` at 1: what the trainer computes.
    `topk_logprobs` has the likeliest tokens of each position, at 1, if they were asked for, and
    `routed_experts` the experts of the token before each, as `Datum` takes them.
    """

    tokens: list[int]
    logprobs: list[float] | None
    stop_reason: StopReason
    model_logprobs: list[float] | None = None
    revision_path: str = ""  # of the adapter that made it; empty: the base model
    topk_logprobs: list[Topk] | None = None
    routed_experts: bytes = b""

    @property
    def tokens_np(self) -> NDArray[np.int32]:
        """`tokens` as an array, [generated]."""
        return np.array(self.tokens, np.int32)

    @property
    def logprobs_np(self) -> NDArray[np.float32] | None:
        """`logprobs` as an array, [generated]."""
        return None if self.logprobs is None else np.array(self.logprobs, np.float32)

    @property
    def topk_logprobs_np(self) -> TopkLogprobs | None:
        """`topk_logprobs` as arrays, [generated, k]."""
        return None if self.topk_logprobs is None else TopkLogprobs.of(self.topk_logprobs)

    @property
    def routed_experts_np(self) -> NDArray[np.uint16]:
        """`routed_experts` as an array, [generated, layers x experts of a token]."""
        return np.frombuffer(self.routed_experts, "<u2").reshape(len(self.tokens), -1)

    @classmethod
    def from_proto(cls, message: sampler_pb2.SampledSequence) -> Self:
        topk = [_topk(entry) for entry in message.topk_logprobs]
        return read(
            cls,
            message,
            stop_reason=_stop_reason(message.stop_reason),
            topk_logprobs=topk or None,
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
    def from_proto(cls, message: sampler_pb2.StreamSampleResponse) -> Self:
        ended = message.stop_reason != sampler_pb2.STOP_REASON_UNSPECIFIED
        reason = _stop_reason(message.stop_reason) if ended else None
        return read(cls, message, stop_reason=reason)


@dataclass(frozen=True, slots=True)
class PromptAltTokens:
    """Tokens that the model might have said in place of a prompt's, drawn at temperature 1, and
    their logprobs: row i after tokens 0 to i. -1 and NaN where they were left out.
    """

    tokens: NDArray[np.int64]  # [prompt length - 1, k]
    logprobs: NDArray[np.float32]  # [prompt length - 1, k]

    @classmethod
    def from_proto(cls, message: sampler_pb2.PromptAltTokens) -> Self:
        tokens, logprobs = map(TensorData.from_proto, (message.tokens, message.logprobs))
        return cls(tokens.to_numpy(), logprobs.to_numpy())


@dataclass(frozen=True, slots=True)
class SampleResponse:
    """The continuations in order, and the seed that makes the same ones again.

    What was asked for of the prompt has an entry for each token, None for the first and for those
    that `prompt_logprobs_last_n` left out. `target_prompt_logprobs` is float32, of the shape of the
    targets, NaN where there is none or it was left out. `prompt_routed_experts` are those of all
    tokens but the last: followed by a sequence's own, they are what a `Datum` takes whose input is
    the prompt and the sequence's tokens but the last.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[Topk | None] | None = None
    seed: int = 0
    prompt_cache_hit_tokens: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_routed_experts: bytes = b""

    @property
    def prompt_logprobs_np(self) -> NDArray[np.float32] | None:
        """`prompt_logprobs` as an array, [prompt], NaN where there is none."""
        # numpy writes None as NaN.
        return None if self.prompt_logprobs is None else np.array(self.prompt_logprobs, np.float32)

    @property
    def topk_prompt_logprobs_np(self) -> TopkLogprobs | None:
        """`topk_prompt_logprobs` as arrays, [prompt, k]."""
        top = self.topk_prompt_logprobs
        return None if top is None else TopkLogprobs.of(top)

    @classmethod
    def from_proto(cls, message: sampler_pb2.SampleResponse) -> Self:
        topk = [_topk(entry) or None for entry in message.topk_prompt_logprobs]
        targets = optional(message, "target_prompt_logprobs", TensorData.from_proto)
        alternatives = optional(message, "prompt_alt_tokens", PromptAltTokens.from_proto)
        return read(
            cls,
            message,
            sequences=[SampledSequence.from_proto(entry) for entry in message.sequences],
            prompt_logprobs=optional_logprobs(message.prompt_logprobs) or None,
            topk_prompt_logprobs=topk or None,
            target_prompt_logprobs=targets,
            prompt_alt_tokens=alternatives,
        )


def optional_logprobs(values: Iterable[float]) -> list[float | None]:
    """Logprobs with None where there is none, which the wire writes as NaN."""
    return [None if math.isnan(value) else value for value in values]


def _stop_reason(reason: int) -> StopReason:
    word: StopReason = known(sampler_pb2.StopReason, reason, "a sequence ended for reason")
    return word


def _topk(message: sampler_pb2.TopkLogprobs) -> Topk:
    return list(zip(message.token_ids, message.logprobs, strict=True))

"""What the sampler's front and engine say to each other: frozen dataclasses of numpy arrays.
Adapters go as names of row files.

The engine keeps adapters by revision path and generates with what it is told; which adapters it
keeps, who may use them and whether a request is legal are the front's to decide.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mint_core.errors import EngineFault, ResourceExhausted

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]
Routed = NDArray[np.uint16]  # [tokens, layers that have experts, experts of a token]

BASE_MODEL = ""  # the `adapter` of work without one
CHUNK_TOKENS = 512  # prompts are computed in pieces of so many


class AdapterAbsent(EngineFault):
    """The engine does not hold the adapter: it was started anew since. Load it and send the job
    again.
    """

    reason = "ADAPTER_ABSENT"


class WaitedTooLong(ResourceExhausted):
    """The request's turn did not come within its `start_within_s`. Final: it carries no hint to try
    again, since its caller set or accepted the limit.
    """

    reason = "WAITED_TOO_LONG"

    def __init__(self, waited_s: float) -> None:
        super().__init__(
            f"the request waited {waited_s:.1f} s for its first pass and `max_wait_s` of the "
            "sampler allows no more; send fewer at the same time, or start the sampler with a "
            "larger --max-wait-s",
            waited_s=f"{waited_s:.1f}",
        )


class StopReason(Enum):
    """Why a continuation ended."""

    STOP = "stop"
    LENGTH = "length"


class RowUnusable(EngineFault):
    """The row file is gone, damaged, or lies otherwise than this engine's rows do."""

    reason = "ROW_UNUSABLE"


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Puts an adapter into the bank; one that is there already stays. Raises RowUnusable. Answer:
    None.
    """

    revision_path: str
    file: str  # a row file


@dataclass(frozen=True, slots=True)
class DescribeRows:
    """Asks how the rows of adapters of a rank lie in the bank. Answer: `RowLayout`."""

    rank: int


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """Takes an adapter out of the bank, if it is there. Nothing may be running on it. Answer:
    None.
    """

    revision_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How tokens are chosen. All is filled in."""

    seed: int
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = -1  # -1: all
    top_p: float = 1.0
    min_p: float = 0.0  # least share of the likeliest token's probability; 0: all
    repetition_penalty: float = 1.0  # 1: none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the text of a continuation must match."""

    kind: str  # "regex" or "json_schema"
    field: str  # of the request, as refusals name it
    text: str  # a regular expression, or a schema in JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """What ends a continuation before `max_tokens`."""

    token_ids: frozenset[int] = frozenset()  # end-of-sequence tokens included
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a request asks for, all filled in: to continue a prompt, or with `num_samples` 0 only to
    score it.
    """

    model_path: str = BASE_MODEL  # as the request names the adapter
    prompt: Tokens  # [prompt], at least one token
    num_samples: int = 0
    max_tokens: int = 0  # of one continuation; prompt and continuation fit in the context
    choice: Choice
    stops: Stops = field(default_factory=Stops)
    constraint: Constraint | None = None  # some stop token ends what matches
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    # [prompt - 1, k] token ids to score in place of each token but the first, -1: none
    target_prompt_tokens: Tokens | None = None
    prompt_alternatives: int = 0  # tokens to draw in place of each but the first
    scored_tokens: int | None = None  # of the prompt, its last ones; None: all but the first
    topk_sample_logprobs: int = 0  # not in a stream
    routed_experts: bool = False  # whether to say where tokens went; not in a stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Does what a request asks for. Answer: `Generated`; with `stream`, a `SamplePart` for each
    sample after each pass, and then a `Generated` without continuations.
    """

    request_id: int  # by which `Abort` names it
    adapter: str  # revision path of a loaded adapter, or BASE_MODEL
    sampling: Sampling
    tenant: str = ""  # tenants share passes and places equally
    had_tokens: int = 0  # by the tenant, of all replicas; the engine counts on from there
    stream: bool = False
    # In which its first pass must begin, from when the engine takes it in: a clock is its machine's
    start_within_s: float | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends a request whose caller has left; it gets no answer. Sent without waiting."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """One sample. All arrays are [generated]."""

    tokens: Tokens  # with the one that ended it
    logprobs: Floats  # at the requested temperature, before top-k and top-p; at 0 those at 1
    model_logprobs: Floats  # at temperature 1
    stop_reason: StopReason
    topk_logprobs: "TokenLogprobs | None" = None
    routed: Routed | None = None  # of the token before each of `tokens`


class SamplePart(NamedTuple):
    """New tokens of one sample. Plain numbers, since an array of one costs more to send; and one is
    sent per token, which as a named tuple takes half a dataclass's time.
    """

    sample: int  # its index
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # as in `Continuation`
    model_logprobs: tuple[float, ...]
    stop_reason: StopReason | None  # None: more will come


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Some tokens of each of consecutive positions: the likeliest first, or as they were drawn."""

    token_ids: Tokens  # [positions, k]
    logprobs: Floats  # [positions, k], at temperature 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came of a `Generate`."""

    continuations: tuple[Continuation, ...]
    prompt_cache_hit_tokens: int = 0  # of the prompt, that were not computed again
    unscored_tokens: int = 1  # the prompt's first ones; what follows is of all others
    prompt_logprobs: Floats | None = None  # [scored]
    topk_prompt_logprobs: TokenLogprobs | None = None
    target_prompt_logprobs: Floats | None = None  # [scored, k], NaN where there is no target
    prompt_alternatives: TokenLogprobs | None = None  # [scored, k], in the order of the draws
    prompt_routed: Routed | None = None  # of all prompt tokens but the last

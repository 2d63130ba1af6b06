"""What the sampler's front and engine say to each other: frozen dataclasses of numpy arrays.
Adapters go as names of row files.

The engine keeps adapters by revision path and generates with what it is told; which adapters it
keeps, who may use them and whether a request is legal are the front's to decide.
"""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from mint_core.errors import EngineFault

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]

BASE_MODEL = ""  # the `adapter` of work without one
CHUNK_TOKENS = 512  # prompts are computed in pieces of so many


class AdapterAbsent(EngineFault):
    """The engine does not hold the adapter: it was started anew since. Load it and send the job
    again.
    """

    reason = "ADAPTER_ABSENT"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """What ends a continuation before `max_tokens`."""

    token_ids: frozenset[int] = frozenset()  # end-of-sequence tokens included
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Continues a prompt, or with `num_samples` 0 only scores it. Answer: `Generated`."""

    request_id: int  # by which `Abort` names it
    adapter: str  # revision path of a loaded adapter, or BASE_MODEL
    prompt: Tokens  # [prompt], at least one token
    num_samples: int
    max_tokens: int  # of one continuation; prompt and continuation fit in the context
    choice: Choice
    stops: Stops = field(default_factory=Stops)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobs:
    """The likeliest tokens of consecutive positions, likeliest first."""

    token_ids: Tokens  # [positions, k]
    logprobs: Floats  # [positions, k], at temperature 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came of a `Generate`."""

    continuations: tuple[Continuation, ...]
    prompt_logprobs: Floats | None = None  # [prompt - 1]: of each token but the first
    topk_prompt_logprobs: TopLogprobs | None = None  # of the same positions


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the front hands its engine at start."""

    base_model: str  # folder or hub id
    base_model_name: str  # under which it is served; empty: `base_model`
    device: str  # "cpu", "cuda", "auto"
    dtype: str  # "float32", "bfloat16", "auto"
    threads: int  # of the engine; 1 keeps CPU results bitwise
    max_lora_rank: int
    max_running_samples: int  # continuations that generate at the same time
    max_batch_tokens: int  # of one pass; 0: computed from free memory
    kv_cache_tokens: int  # 0: computed from free memory
    adapter_memory_bytes: int  # 0: computed from free memory
    host_adapter_memory_bytes: int = 0  # of adapters in host memory beside a GPU; 0: computed
    log_level: str = "INFO"

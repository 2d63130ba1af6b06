"""Sequenced calls as the front knows them once they are parsed, and how they end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mint_core.errors import MintError
from trainer_service.jobs import AdamParams, Document, Floats, Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a call belongs."""

    training_run_id: str
    sequence: int
    writer_epoch: int
    acknowledged_sequence: int
    payload_hash: bytes  # of what must be the same in a repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    documents: tuple[Document, ...]
    loss: Loss
    backward: bool
    weighted_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    adam_params: AdamParams
    backward_count: int | None  # None: not checked


@dataclass(frozen=True, slots=True)
class Discard:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    name: str
    overwrite: bool
    ttl_s: float | None
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveForSampler:
    name: str | None  # None: an unnamed snapshot
    ttl_s: float | None
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    path: str
    with_optimizer: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A call whose content is bad. It keeps its place: the refusal is the outcome of its number."""

    error: MintError


Work = Compute | Step | Discard | Save | SaveForSampler | Load | Refused

# What a call is, known even when its content is bad; the RPC's name.
Method = Literal[
    "Forward",
    "ForwardBackward",
    "OptimStep",
    "DiscardGradient",
    "SaveState",
    "SaveWeightsForSampler",
    "LoadState",
]


@dataclass(slots=True)
class Course:
    """How a call fares."""

    wait_s: float | None = None  # from its acceptance to its turn
    run_s: float | None = None
    deaths: int = 0  # of engines that had it


@dataclass(frozen=True, slots=True)
class Call:
    place: Place
    method: Method
    work: Work
    payload: bytes = field(default=b"", repr=False, compare=False)  # the request, canonical
    course: Course = field(default_factory=Course, compare=False)

    @property
    def exclusive(self) -> bool:
        """Whether the call must not run beside others of its run."""
        return self.method not in ("Forward", "ForwardBackward")

    @property
    def tokens(self) -> int:
        if not isinstance(self.work, Compute):
            return 0
        return sum(len(document.tokens) for document in self.work.documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    logprobs: tuple[Floats, ...]  # per datum
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    step: int
    metrics: Mapping[str, float]
    weight_digest: int = field(default=0, compare=False)  # for the journal alone


@dataclass(frozen=True, slots=True)
class Discarded:
    gradient_discarded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    path: str
    revision_path: str
    step: int
    gradient_pending: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    step: int
    revision_path: str
    gradient_discarded: bool


Outcome = Computed | Stepped | Discarded | Saved | Loaded | MintError

_SMALL_BYTES = 1024  # of an outcome without arrays, about


def size_bytes(outcome: Outcome) -> int:
    """What keeping an outcome costs, roughly."""
    if not isinstance(outcome, Computed):
        return _SMALL_BYTES
    return _SMALL_BYTES + sum(array.nbytes for array in outcome.logprobs)

"""Sequenced calls as the front knows them once they are parsed, and how they end."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

from checkpoint_store import CheckpointKind
from mint_core.errors import MintError
from trainer_service.jobs import AdamParams, Document, Loss, SavedRow


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
    kind: CheckpointKind  # of training state, or of an adapter for samplers
    name: str | None  # None: an unnamed snapshot, of an adapter alone
    overwrite: bool = True  # whether a name of training state may exist
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


Work = Compute | Step | Discard | Save | Load | Refused

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
    noted: "asyncio.Future[Any] | None" = None  # that it was accepted, on disk; None: long since
    accepted_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Call:
    place: Place
    method: Method
    work: Work
    payload: bytes = field(default=b"", repr=False, compare=False)  # the request, canonical
    # Drawn when the call is accepted, for what it makes in the store: a call of the same number in
    # a state that was restored from a backup has another.
    mark: str = ""
    course: Course = field(default_factory=Course, compare=False)

    @property
    def exclusive(self) -> bool:
        """Whether the call must not run beside others of its run."""
        return self.method not in ("Forward", "ForwardBackward")

    @property
    def computes(self) -> bool:
        """Whether it is for the planner."""
        return isinstance(self.work, Compute | Step)

    @property
    def needs_row(self) -> bool:
        """Whether the engine must have the row. A step clears the gradient even if refused."""
        return self.method == "OptimStep" or not isinstance(self.work, Refused)

    @property
    def tokens(self) -> int:
        return sum(len(document.tokens) for document in self._documents)

    @property
    def cost(self) -> int:
        """In tokens: see Document."""
        return sum(document.cost for document in self._documents)

    @property
    def _documents(self) -> tuple[Document, ...]:
        return self.work.documents if isinstance(self.work, Compute) else ()


class Effect(IntEnum):
    """What a call that has ended did to its run's row."""

    NONE = 0
    ADD = 1  # to the gradient
    STEP = 2
    CLEAR = 3  # the gradient


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it is kept and sent, however often."""

    content: bytes  # the response message; of a call that failed, a google.rpc.Status
    failed: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call has come to."""

    make_reply: Callable[[], bytes]
    effect: Effect = Effect.NONE
    error: MintError | None = None
    step: int | None = None  # of the run from now on; None: as before
    digest: int | None = None  # of the weights after a step
    metrics: Mapping[str, float] = field(default_factory=dict)
    saved_row: SavedRow | None = None  # of what the call has made of the row

    @property
    def changes_row(self) -> bool:
        return self.effect in (Effect.ADD, Effect.STEP)

    @cached_property
    def reply(self) -> Reply:
        """Made once, when it is first asked for: on the journal's thread, since it may be large."""
        return Reply(self.make_reply(), self.error is not None)

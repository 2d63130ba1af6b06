"""What front and engine say to each other, and the engine's side of the pipe. No gRPC here.

An engine module is run as `python -m <module> <fd>` and calls `connect`. The first thing it
receives is its configuration; the first thing it sends is `Hello`, or `Failure(0, ...)` if it
cannot start.
"""

import ctypes
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from mint_core.errors import EngineFault, MintError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    number: int  # 0: no answer is wanted
    job: Any


class Part(NamedTuple):
    """A part of the answer to a call, before its `Reply`. One goes out for every token that is
    streamed, and a named tuple is pickled in half a dataclass's time.
    """

    number: int
    value: Any  # None: the rest is done aside, in its own time, and the engine goes on


@dataclass(frozen=True)
class Reply:
    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    number: int  # 0: the engine could not start
    error: MintError


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Still working."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine tells of itself, for metrics."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """The base model as the engine loaded it."""

    name: str
    folder: str  # with the tokenizer's files
    context_length: int  # tokens of the longest sequence taken here
    vocabulary_size: int
    max_lora_rank: int
    fingerprint: str
    other_fingerprint: str = ""  # with float8 weights if it has none, or without
    adapters_across_dtypes: bool = False  # whether what was made on that opens here
    dtype: str
    device: str
    eos_token_ids: tuple[int, ...]
    bitwise_reproducible: bool
    linear_modules: tuple[str, ...]  # full names of the nn.Linear layers that LoRA can train
    memory_bytes: int  # of the base weights
    memory_bound: bool = False  # whether memory, not the model, sets `context_length`
    linear_shapes: tuple[tuple[int, int], ...] = ()  # (out, in) of each of `linear_modules`
    text_only: bool = False  # whether its checkpoint reads more, which is left out
    bits_traded_for_speed: bool = False  # whether the engine was told to
    routed: "RoutedShape | None" = None  # of a model that has experts

    def opens(self, fingerprint: str) -> bool:
        """Whether adapters and state that were made on a base of that fingerprint open on this."""
        across = self.adapters_across_dtypes and fingerprint == self.other_fingerprint
        return across or fingerprint == self.fingerprint

    def remedy(self, fingerprint: str, otherwise: str) -> str:
        """What to do about those that do not; `otherwise` where it is another model's."""
        if fingerprint != self.other_fingerprint:
            return otherwise
        kind = "without" if self.dtype == "float8" else "with"
        return (
            f"that is this model {kind} float8 weights; {otherwise}, or start the service with "
            "--adapters-across-dtypes: by what float8 rounds the adapter computes otherwise"
        )


class RoutedShape(NamedTuple):
    """Which experts tokens may go to."""

    layers: int  # that have experts
    experts: int  # of such a layer
    per_token: int  # that a token goes to


@dataclass(frozen=True, slots=True)
class Hello:
    model: ModelDescription
    max_batch_tokens: int = 0  # trainer: most tokens of one pass
    adapter_ranks: int = 0  # sampler: largest sum of the stored ranks of adapters in memory
    kv_cache_tokens: int = 0  # sampler: whose keys and values fit in memory at the same time
    memory_limits: Mapping[str, int] = field(default_factory=dict)  # bytes, by what they are for
    traits: str = ""  # on what the last bits of results depend, beside requests


class EnginePipe:
    """The engine's end. `receive` returns None when the front is gone. Any thread may send."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return None

    def waiting(self, limit_s: float = 0) -> bool:
        """Whether `receive` would return at once, or will within the limit."""
        return self._connection.poll(limit_s)

    def send(self, message: object) -> None:
        """Ends the calling thread if the front is gone: there is nobody to tell."""
        with self._sending:
            try:
                self._connection.send(message)
            except (BrokenPipeError, ConnectionResetError):
                raise SystemExit(1) from None

    def send_all(self, messages: Sequence[object]) -> None:
        """Messages in order: together they cost one write, and wake the front's loop once."""
        if messages:
            self.send(list(messages))

    def fail(self, number: int, error: Exception) -> None:
        """Sends a domain error as it is, and anything else as our bug."""
        if not isinstance(error, MintError):
            logger.error("call failed in the engine\n%s", traceback.format_exc())
            error = EngineFault(
                f"the engine failed with {type(error).__name__}; the server's log has the details"
            )
        self.send(Failure(number, error))


def connect() -> tuple[EnginePipe, Any]:
    """Opens the pipe whose descriptor is the first argument and returns it with the engine's
    configuration.
    """
    die_with_the_front()
    pipe = EnginePipe(Connection(int(sys.argv[1])))
    config = pipe.receive()
    if config is None:
        raise SystemExit("the front ended before it sent a configuration")
    return pipe, config


def die_with_the_front() -> None:
    """Lets the kernel end an engine that hangs or computes when its front is killed."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)

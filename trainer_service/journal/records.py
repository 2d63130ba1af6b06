"""What the journal is made of: its rows as values, and the ids of calls."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer_service.calls import Effect, Method
from trainer_service.run_description import RunState

# Of the table of states: the fields of RunState and, in the gradient's place, those of Gradient.
STATE_COLUMNS = (
    *("step", "writer_epoch", "acknowledged", "backward_count", "added", "failed_sequence"),
    *("update_time", "inexact_replays", "inexact_note", "dropped"),
)
SEQUENCE_BITS = 32  # of a call's id
_SIGNED = 2**64  # SQLite's integers are signed


@dataclass(frozen=True, slots=True)
class RunRecord:
    number: int
    training_run_id: str
    origin: str  # JSON, see codec.py
    metadata: Mapping[str, str]
    retention_s: float
    removing: bool | None  # whether its named checkpoints go too; None: it is not being deleted
    state: RunState


@dataclass(frozen=True, slots=True)
class CallRecord:
    sequence: int
    method: Method
    payload_hash: bytes
    mark: str
    deaths: int
    payload: bytes | None  # of calls that have not ended
    answer: bytes | None  # of the others, unless acknowledged


@dataclass(frozen=True, slots=True)
class RequestRecord:
    tenant: str
    request_id: str
    payload_hash: bytes
    answer: bytes  # the response message
    time_s: float


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call to be replayed."""

    sequence: int
    effect: Effect
    digest: int | None


@dataclass(frozen=True, slots=True)
class Payload:
    """What was sent with a call; see codec.py."""

    method: Method
    payload_hash: bytes
    payload: bytes


def call_id(run: int, sequence: int) -> int:
    return run << SEQUENCE_BITS | sequence


def sequence_of(call: int) -> int:
    """The sequence in a call's id."""
    return call & ((1 << SEQUENCE_BITS) - 1)


def last_id(run: int) -> int:
    """The highest id that a call of a run may have."""
    return call_id(run + 1, 0) - 1


def signed(digest: int | None) -> int | None:
    """A digest as the database takes it."""
    return digest - _SIGNED if digest is not None and digest >= _SIGNED // 2 else digest


def unsigned(stored: int | None) -> int | None:
    """The digest that was stored."""
    return None if stored is None else stored % _SIGNED

"""What the journal is made of: its rows as values, and the ids of calls."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from trainer_service.run.run import RunState

SEQUENCE_BITS = 32  # of a call's id
_SIGNED = 2**64  # SQLite's integers are signed


class Effect(IntEnum):
    """What a call that has ended did to its run's row."""

    NONE = 0
    ADD = 1  # to the gradient
    STEP = 2
    CLEAR = 3  # the gradient


@dataclass(frozen=True, slots=True)
class RunRecord:
    number: int
    origin: str  # JSON, see codec.py
    metadata: Mapping[str, str]
    retention_s: float
    state: RunState
    covered: int  # sequence of the last call in the snapshot; 0: there is none
    dirty: bool  # whether calls behind it have changed the row


@dataclass(frozen=True, slots=True)
class CallRecord:
    sequence: int
    method: str
    payload_hash: bytes
    deaths: int
    payload: bytes | None  # of calls that have not ended
    answer: bytes | None  # of the others, unless acknowledged


@dataclass(frozen=True, slots=True)
class TileRecord:
    """Documents `first` to `first + documents` of a call, computed in a plan."""

    run: int
    sequence: int
    tile: int
    first: int
    documents: int


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    sequence: int
    file: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    tenant: str
    request_id: str
    payload_hash: bytes
    answer: str  # JSON
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

    method: str
    payload_hash: bytes
    payload: bytes


def key(run: int, sequence: int) -> int:
    """A call's id."""
    return run << SEQUENCE_BITS | sequence


def place(call: int) -> tuple[int, int]:
    """The run's number and the sequence of a call's id."""
    return call >> SEQUENCE_BITS, call & ((1 << SEQUENCE_BITS) - 1)


def last_key(run: int) -> int:
    """The highest id that a call of a run may have."""
    return key(run + 1, 0) - 1


def signed(digest: int | None) -> int | None:
    """A digest as the database takes it."""
    return digest - _SIGNED if digest is not None and digest >= _SIGNED // 2 else digest


def unsigned(stored: int | None) -> int | None:
    """The digest that was stored."""
    return None if stored is None else stored % _SIGNED

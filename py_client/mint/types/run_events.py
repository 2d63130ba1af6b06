"""What watching a run tells."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

import grpc

from mint.types._from_proto import optional, read, time_of
from mint.types.responses import TrainingRun
from mintrpc.v1 import trainer_pb2

_CODES: Mapping[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}  # by number


@dataclass(frozen=True, slots=True)
class QueueProgress:
    """What of a run waits. Tokens and seconds are those until its next data are computed."""

    waiting_calls: int
    tokens_ahead: int  # of other runs
    estimated_wait_s: float | None  # None: the server cannot tell yet

    @classmethod
    def from_proto(cls, message: trainer_pb2.QueueProgress) -> Self:
        wait = optional(message, "estimated_wait", lambda wait: wait.ToTimedelta().total_seconds())
        return read(cls, message, estimated_wait_s=wait)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOutcome:
    """How a call of the run ended. `missed_outcomes` just before it were not told: the reader was
    slow."""

    sequence: int
    method: str  # such as "OptimStep"
    step: int  # of the run, by then
    code: str  # "OK", or such as "INVALID_ARGUMENT"
    metrics: dict[str, float]
    missed_outcomes: int

    @classmethod
    def from_proto(cls, message: trainer_pb2.CallOutcome) -> Self:
        return read(cls, message, code=_CODES.get(message.code, "UNKNOWN"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """One thing that happened to a run: one of the three, the others are None."""

    event_time: datetime
    training_run: TrainingRun | None = None
    queue_progress: QueueProgress | None = None
    call_outcome: CallOutcome | None = None

    @classmethod
    def from_proto(cls, message: trainer_pb2.WatchTrainingRunResponse) -> Self | None:
        """None: an event that this client does not know."""
        name = message.WhichOneof("event")
        if name is None:
            return None
        event = _EVENTS[name].from_proto(getattr(message, name))  # type: ignore[attr-defined]
        return cls(event_time=time_of(message.event_time), **{name: event})


_EVENTS = {
    "training_run": TrainingRun,
    "queue_progress": QueueProgress,
    "call_outcome": CallOutcome,
}

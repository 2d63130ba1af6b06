"""Who makes the call that is being served, and what its log line will say."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from mint_core.errors import MintError

DEFAULT_TENANT = "default"
_MARK = "records_refusals"

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str
    notes: dict[str, object] = field(default_factory=dict, compare=False, repr=False)
    refusals: list[MintError] = field(default_factory=list, compare=False, repr=False)


_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Returns who makes the call. Only inside a servicer's method and the tasks it starts."""
    return _caller.get()


def set_caller(who: Caller) -> None:
    """Says who makes the call that the current task serves."""
    _caller.set(who)


def records_refusals(method: M) -> M:
    """Marks a method that records refusals itself: it finds them in `caller().refusals`."""
    setattr(method, _MARK, True)
    return method


def is_recording_refusals(method: object) -> bool:
    """Whether a servicer's method is so marked."""
    return getattr(method, _MARK, False)


def note(**values: object) -> None:
    """Adds values to the call's log line, such as `note(tokens=8192, run_s=0.21)`."""
    _caller.get().notes.update(values)

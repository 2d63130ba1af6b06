"""Who makes the call that is being served, and what its log line will say."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from mint_core.errors import MintError

DEFAULT_TENANT = "default"

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str
    notes: dict[str, object] = field(default_factory=dict, compare=False, repr=False)
    refusals: list[MintError] = field(default_factory=list, compare=False, repr=False)


CALLER: ContextVar[Caller] = ContextVar("caller")  # who makes the call that a task serves


def caller() -> Caller:
    """Returns who makes the call. Only inside a servicer's method and the tasks it starts."""
    return CALLER.get()


def records_refusals(method: M) -> M:
    """Marks a method that records refusals itself: it finds them in `caller().refusals`."""
    method.records_refusals = True  # type: ignore[attr-defined]
    return method


def note(**values: object) -> None:
    """Adds values to the call's log line, such as `note(tokens=8192, run_s=0.21)`."""
    caller().notes.update(values)

"""Who makes the call that is being served, and what its log line will say."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mint_core.errors import MintError
from mint_core.rpc.limits import LARGE_BYTES
from mint_core.turns import Workers

M = TypeVar("M")
T = TypeVar("T")


@dataclass(slots=True)
class Caller:
    tenant: str
    key_id: str = ""
    scopes: frozenset[str] = frozenset()
    parsers: Workers | None = None  # for what is large; None: what parses is not a server's call
    request_bytes: int = 0  # of the message that came; of several, of the largest
    notes: dict[str, object] = field(default_factory=dict, compare=False, repr=False)
    refusals: list[MintError] = field(default_factory=list, compare=False, repr=False)


CALLER: ContextVar[Caller] = ContextVar("caller")  # who makes the call that a task serves


def caller() -> Caller:
    """Returns who makes the call. Only inside a servicer's method and the tasks it starts."""
    return CALLER.get()


async def parsed(function: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """Calls what parses the request: what is large in a thread, in the tenant's turn."""
    who = caller()
    if who.request_bytes < LARGE_BYTES or who.parsers is None:
        return function(*args, **options)
    return await who.parsers.run(who.tenant, function, *args, **options)


def records_refusals(method: M) -> M:
    """Marks a method that records refusals itself: it finds them in `caller().refusals`."""
    method.records_refusals = True  # type: ignore[attr-defined]
    return method


def note(**values: object) -> None:
    """Adds values to the call's log line, such as `note(tokens=8192, run_s=0.21)`."""
    caller().notes.update(values)

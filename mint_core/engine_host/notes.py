"""What a front says to its driver in the pipe, between messages to the engine, and what it hears.

Messages are pickles, which begin with their protocol's mark; what begins otherwise is JSON, for the
driver.
"""

import json
from typing import Any, NamedTuple

MARK = b"{"


class Before(NamedTuple):
    """A job comes: what it reads is to be there, and room for what it writes."""

    number: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]


class After(NamedTuple):
    """It has been answered: what it wrote is to be fetched, or forgotten if it has failed. With
    files to fetch, `Fetched` comes back.
    """

    number: int
    failed: bool


class Fetched(NamedTuple):
    """All that a job has written is here; or `error`, a number of the system's, says why not."""

    number: int
    error: int
    strerror: str


def encode(note: Before | After) -> bytes:
    return json.dumps({type(note).__name__: note}).encode()


def decode(content: bytes) -> Before | After:
    ((name, fields),) = json.loads(content).items()
    kinds: dict[str, Any] = {"Before": Before, "After": After}
    note: Before | After = kinds[name](*fields)
    return note

"""Checks of single fields of requests: each returns the value or raises InvalidRequest."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from checkpoint_store import check_name as check_name
from mint_core.errors import InvalidRequest
from mint_core.rpc import limits

MAX_TTL_DAYS = 36_500

T = TypeVar("T")


def text(value: str, field: str) -> str:
    """Returns a text that must not be empty."""
    if not value:
        raise InvalidRequest(f"`{field}` is empty; it is required", field=field)
    return value


def within(value: int, field: str, least: int, most: int | None = None) -> int:
    """Returns a whole number between its bounds."""
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise InvalidRequest(f"`{field}` is {value} but must be {bounds}", field=field, value=value)
    return value


def finite(value: float, field: str, below: float = math.inf) -> float:
    """Returns a number that is finite, at least 0 and less than `below`."""
    if not 0 <= value < below:  # false for NaN too
        bounds = "finite and at least 0" if below == math.inf else f"in [0, {below:g})"
        raise InvalidRequest(
            f"`{field}` is {value:g} but must be {bounds}", field=field, value=value
        )
    return value


def request_id(value: str, field: str = "request_id") -> str:
    text(value, field)
    if len(value) > limits.MAX_REQUEST_ID_CHARACTERS:
        raise InvalidRequest(
            f"`{field}` has {len(value)} characters but at most {limits.MAX_REQUEST_ID_CHARACTERS} "
            "are taken; "
            "a UUID will do",
            field=field,
            characters=len(value),
        )
    return value


def metadata(entries: Mapping[str, str], field: str = "metadata") -> dict[str, str]:
    size_bytes = sum(len(key.encode()) + len(value.encode()) for key, value in entries.items())
    if size_bytes > limits.MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"`{field}` has {size_bytes} bytes but at most {limits.MAX_METADATA_BYTES} are kept; "
            "shorten it",
            field=field,
            size_bytes=size_bytes,
        )
    return dict(entries)


def kind(value: int, known: Mapping[int, T]) -> T | None:
    """Returns what a kind means; None where it is left out."""
    if value and value not in known:
        raise InvalidRequest(f"`kind` {value} is unknown to this server", field="kind")
    return known.get(value)


def ttl_s(request: Any, field: str = "ttl") -> float | None:
    """Returns how long to keep something, in seconds; None if the request does not say."""
    if not request.HasField(field):
        return None
    ttl: Duration = getattr(request, field)
    seconds = ttl.seconds + ttl.nanos * 1e-9
    if not 0 < seconds <= MAX_TTL_DAYS * 86_400:
        raise InvalidRequest(
            f"`{field}` is {seconds:g} s but must be more than 0 and at most {MAX_TTL_DAYS} days; "
            "leave it out for what the field's description says",
            field=field,
            seconds=seconds,
        )
    return seconds

"""Values out of the contract's messages, field by field."""

import dataclasses
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, Self, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from mint.errors import APIResponseValidationError

T = TypeVar("T")


class FromMessage:
    """A dataclass whose fields are those of a message, or some of them, by the same names."""

    __slots__ = ()

    @classmethod
    def from_proto(cls, message: Any) -> Self:
        return read(cls, message)


def read(kind: Callable[..., T], message: Message, /, **others: Any) -> T:
    """A `kind` of the message's fields that have its fields' names, but for `others`."""
    names = (name for name in _names(kind) if name not in others)
    return kind(**{name: _plain(getattr(message, name)) for name in names}, **others)


def optional(message: Message, name: str, convert: Callable[[Any], T]) -> T | None:
    """What `convert` makes of a field; None if it is absent."""
    return convert(getattr(message, name)) if message.HasField(name) else None


def known(options: Mapping[Any, T], value: int, where: str) -> T:
    """What an enum's value stands for. `where` begins the sentence over one that is not known."""
    if value not in options:
        raise APIResponseValidationError(f"{where} {value}, unknown to this client")
    return options[value]


def time_of(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _plain(value: Any) -> Any:
    """Without protobuf."""
    if isinstance(value, str | bytes | int | float):
        return value
    if isinstance(value, Timestamp):
        return time_of(value)
    return dict(value) if isinstance(value, Mapping) else list(value)

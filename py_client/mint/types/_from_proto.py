"""Values out of the contract's messages, field by field, and its enums as words."""

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


@cache
def words(enum: Any) -> dict[str, Any]:
    """An enum's values by what tells their names apart: CHECKPOINT_KIND_TRAINING by `training`."""
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")
    return {name.removeprefix(prefix).lower(): value for name, value in enum.items() if value}


def known(enum: Any, value: int, where: str) -> Any:
    """An enum's value as a word. `where` begins the sentence over one that is not known."""
    for word, known_value in words(enum).items():
        if value == known_value:
            return word
    raise APIResponseValidationError(f"{where} {value}, unknown to this client")


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

"""Refusal of what this server does not know in a request: nothing a caller sets is ignored."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from mint_core.errors import InvalidRequest


class UnknownField(InvalidRequest):
    """A field that the request's type does not have. `request` is what is left without it."""

    def __init__(self, request: Message, path: str, number: int) -> None:
        super().__init__(
            f"field number {number} in `{path or 'the request'}` is unknown to this server;"
            " the client is newer than the server: use one of the server's version",
            field=path,
            field_number=number,
        )
        self.request = request


def parse(from_bytes: Callable[[bytes], Message], raw: bytes) -> Message:
    """Returns the message. Refuses bytes that are none, and fields that its type does not have."""
    try:
        message = from_bytes(raw)
    except DecodeError as error:
        raise InvalidRequest(
            "the request's bytes are not this RPC's message; use a client of the server's version"
        ) from error
    size_bytes = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size_bytes:
        path, number = next(_unknown(from_bytes(raw), ""))
        raise UnknownField(message, path, number)
    return message


def _unknown(message: Message, path: str) -> Iterator[tuple[str, int]]:
    """Yields where an unknown field is, and its number."""
    unknown: Iterable[Any] = UnknownFieldSet(message)  # type: ignore[assignment]  # stubs lack it
    for field in unknown:
        yield path, field.field_number
    for descriptor, value in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for place, child in _children(descriptor, value):
                yield from _unknown(child, f"{path}.{place}" if path else place)


def _children(descriptor: FieldDescriptor, value: Any) -> Iterator[tuple[str, Message]]:
    name = descriptor.name
    kind = descriptor.message_type
    assert kind is not None
    if kind.GetOptions().map_entry:
        if kind.fields_by_name["value"].type == FieldDescriptor.TYPE_MESSAGE:
            yield from ((f"{name}.{key}", child) for key, child in value.items())
    elif descriptor.is_repeated:
        yield from ((f"{name}[{index}]", child) for index, child in enumerate(value))
    else:
        yield name, value

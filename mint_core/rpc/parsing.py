"""Requests: their bytes are read twice. First field by field against the bounds and for what this
server does not know, which stops at the first fault and makes nothing; then by protobuf.
"""

import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from mint_core.errors import InvalidRequest
from mint_core.lora.spec import LARGEST_FLOAT32
from mint_core.rpc.bounds import MAX_VALUES, Bound, bound_of
from mint_core.rpc.limits import MAX_MESSAGE_BYTES, MAX_TEXT_BYTES

_VARINT, _FIXED64, _LENGTH, _FIXED32 = (
    0,
    1,
    2,
    5,
)  # https://protobuf.dev/programming-guides/encoding/
_DOUBLE = struct.Struct("<d")
_MOST_ELEMENT_BYTES = 10  # of a packed list
_KEY_TAG = 1 << 3 | _LENGTH  # in an entry of a map
_CONTINUES = bytes(range(0x80, 0x100))  # bytes of a varint that are not its last

_F = FieldDescriptor
_WIRES = {
    **dict.fromkeys((_F.TYPE_STRING, _F.TYPE_BYTES, _F.TYPE_MESSAGE), _LENGTH),
    **dict.fromkeys((_F.TYPE_DOUBLE, _F.TYPE_FIXED64, _F.TYPE_SFIXED64), _FIXED64),
    **dict.fromkeys((_F.TYPE_FLOAT, _F.TYPE_FIXED32, _F.TYPE_SFIXED32), _FIXED32),
}


class NotTaken(InvalidRequest):
    """A request with a field that this server does not know, or with more than it takes. `request`
    is what was read before, of the fields that are no messages.
    """

    request: Message


class UnknownField(NotTaken):
    """The client is newer than the server."""

    reason = "UNKNOWN_FIELD"


class _Fault(Exception):
    """What is wrong with a field; the path grows as it is raised through the messages around."""

    def __init__(
        self,
        say: Callable[[str], str],
        path: str = "",
        kind: type[NotTaken] = NotTaken,
        **metadata: object,
    ) -> None:
        self._say = say
        self._kind = kind
        self.path = path
        self._metadata = metadata

    def within(self, place: str) -> "_Fault":
        self.path = ".".join(filter(None, (place, self.path)))
        return self

    def refusal(self) -> NotTaken:
        return self._kind(self._say(self.path), field=self.path, **self._metadata)


class _Field:
    """A field of a request as its bytes have it."""

    def __init__(self, field: FieldDescriptor) -> None:
        assert field.containing_type is not None
        in_map = field.containing_type.GetOptions().map_entry
        self.name = "" if in_map else field.name  # the entry's place says it all
        self.number = field.number
        self.wire = _WIRES.get(field.type, _VARINT)
        self.repeated = field.is_repeated
        self.packs = self.repeated and self.wire != _LENGTH  # a list of them may come as bytes
        self.bound: Bound = bound_of(field)
        self.most = self.bound.most
        self.kind = None if field.message_type is None else _kind_of(field.message_type)
        self.is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        self.is_double = field.type == _F.TYPE_DOUBLE
        is_text = field.type == _F.TYPE_STRING
        self.most_bytes = self.bound.most_bytes or MAX_TEXT_BYTES if is_text else MAX_MESSAGE_BYTES

    def tags(self) -> Iterator[int]:
        """With which it may come."""
        yield self.number << 3 | self.wire
        if self.packs:
            yield self.number << 3 | _LENGTH

    def place(self, count: int, raw: bytes, start: int) -> str:
        """Where one of its messages is: the count-th, which starts there."""
        if self.is_map:
            return f"{self.name}.{_key(raw, start)}"
        return f"{self.name}[{count - 1}]" if self.repeated else self.name


def _key(raw: bytes, start: int) -> str:
    """Of an entry of a map, which has it first, as all encoders write it."""
    size, begin = _varint(raw, start + 1)
    return raw[begin : begin + size].decode(errors="replace") if raw[start] == _KEY_TAG else ""


class _Kind:
    """A message as its bytes have it."""

    def __init__(self, kind: Descriptor) -> None:
        fields = map(_Field, kind.fields)
        self.by_tag = {tag: field for field in fields for tag in field.tags()}


@cache
def _kind_of(kind: Descriptor) -> _Kind:
    return _Kind(kind)


def parse(from_bytes: Callable[[bytes], Message], raw: bytes) -> Message:
    """Returns the message. Raises NotTaken, and InvalidRequest for bytes that are no message."""
    kind = _kind_of(from_bytes(b"").DESCRIPTOR)
    scan = _Scan(raw)
    try:
        try:
            scan.message(0, len(raw), kind, outermost=True)
        except _Fault as fault:
            refusal = fault.refusal()
            refusal.request = from_bytes(b"".join(scan.plain))
            raise refusal from None
        return from_bytes(raw)
    except (DecodeError, IndexError, struct.error) as error:
        raise InvalidRequest(
            "the request's bytes are not this RPC's message; use a client of the server's version"
        ) from error


class _Scan:
    """Reads a request's bytes and keeps nothing of them but plain fields of the outermost message.

    Raises _Fault, and IndexError or struct.error where they end too early.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._values = 0
        self.plain: list[bytes] = []

    def message(self, start: int, end: int, kind: _Kind, *, outermost: bool = False) -> None:
        raw, by_tag, counts = self._raw, kind.by_tag, dict[int, int]()
        position, values = start, 0
        while position < end:
            begin = position
            values += 1
            tag = raw[position]
            position += 1
            if tag >= 0x80:
                tag, position = _varint(raw, begin)
            field = by_tag.get(tag)
            if field is None:
                raise _unknown(tag >> 3)
            wire, count = tag & 7, counts.get(field.number, 0) + 1
            if wire == _LENGTH:
                size = raw[position]
                position += 1
                if size >= 0x80:
                    size, position = _varint(raw, position - 1)
                position += size
                if position > end:
                    raise IndexError
                if field.kind is not None:
                    if count <= field.most:
                        try:
                            self.message(position - size, position, field.kind)
                        except _Fault as fault:
                            raise fault.within(field.place(count, raw, position - size)) from None
                elif field.packs:
                    if size > _MOST_ELEMENT_BYTES * field.most:  # too many, without counting them
                        raise _too_many(field)
                    count += _elements(raw, position - size, position, field.wire) - 1
                elif size > field.most_bytes:
                    raise _too_long(field, size)
            elif wire == _VARINT:
                _, position = _varint(raw, position)
            else:
                if field.is_double:
                    _check_number(field, *_DOUBLE.unpack_from(raw, position))
                position += 8 if wire == _FIXED64 else 4
            counts[field.number] = count
            if count > field.most:
                raise _too_many(field)
            if outermost and field.kind is None:
                self.plain.append(raw[begin:position])
        if position != end:
            raise IndexError
        self._values += values
        if self._values > MAX_VALUES:
            raise _FULL


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """Returns a number and where it ends."""
    value = shift = 0
    while True:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift >= 70:
            raise IndexError


def _elements(raw: bytes, start: int, end: int, wire: int) -> int:
    """How many elements a packed list has."""
    if wire == _VARINT:
        return len(raw[start:end].translate(None, _CONTINUES))
    return (end - start) // (8 if wire == _FIXED64 else 4)


def _unknown(number: int) -> _Fault:
    return _Fault(
        lambda path: (
            f"field number {number} in `{path or 'the request'}` is unknown to this server; the "
            "client is newer than the server: use one of the server's version"
        ),
        kind=UnknownField,
        field_number=number,
    )


def _too_many(field: _Field) -> _Fault:
    most, remedy = field.most, field.bound.remedy
    if not field.repeated:
        return _Fault(lambda path: f"`{path}` is given twice; give it once", field.name)
    return _Fault(
        lambda path: f"`{path}` has more than {most} entries; {remedy}", field.name, most=most
    )


def _too_long(field: _Field, size: int) -> _Fault:
    most, remedy = field.most_bytes, field.bound.remedy
    return _Fault(
        lambda path: f"`{path}` has {size} bytes but at most {most} are taken; {remedy}",
        field.name,
        size_bytes=size,
    )


def _check_number(field: _Field, value: Any) -> None:
    """Refuses what float32 does not hold; what is no number is for those who know the field."""
    size, bound = abs(value), field.bound
    if LARGEST_FLOAT32 < size < float("inf"):
        problem = f"but must be within {LARGEST_FLOAT32:.6g}, the largest number of float32"
    elif size < bound.least and (value or bound.positive):
        problem = f"but must be at least {bound.least:.6g}, the smallest number of float32"
    else:
        return
    raise _Fault(lambda path: f"`{path}` is {value:g} {problem}", field.name, value=value)


_FULL = _Fault(
    lambda path: (
        f"the request has more than {MAX_VALUES} values, the last of them in `{path}`; split it, "
        "and send lists of numbers packed"
    )
)

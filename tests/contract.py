"""The contract with its comments, and which of its fields are required."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parents[1]
# Numbers of fields in the descriptors themselves, which name the places of comments.
MESSAGE, ENUM, SERVICE, NESTED, NESTED_ENUM, MEMBER, ONEOF = 4, 5, 6, 3, 4, 2, 8
REQUIRED = "Required"


@dataclass(frozen=True, slots=True)
class Member:
    """A field, or a oneof, with its comment."""

    name: str
    type: str
    comment: str
    field: FieldDescriptorProto | None = None
    oneof: "Member | None" = None  # that it belongs to

    @property
    def required(self) -> str:
        """Whether a request must have it: yes, when, or nothing."""
        first = self.comment.partition(".")[0]
        if not first.startswith(REQUIRED):
            return ""
        return first.removeprefix(REQUIRED).strip() or "yes"

    @property
    def what(self) -> str:
        """The comment without that."""
        return self.comment.partition(". ")[2] if self.required else self.comment


@dataclass(frozen=True, slots=True)
class Part:
    """A service, message or enum."""

    name: str
    kind: str
    comment: str
    members: tuple[Member, ...]


@cache
def files() -> tuple[FileDescriptorProto, ...]:
    """As they are on the disk, in order of their names."""
    built = subprocess.run(
        [Path(sys.executable).with_name("buf"), "build", "-o", "-#format=binpb"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    found = FileDescriptorSet.FromString(built.stdout).file
    return tuple(sorted((f for f in found if f.package == "mintrpc.v1"), key=lambda f: f.name))


def parts(file: FileDescriptorProto) -> Iterator[Part]:
    """Services first, then messages in their order, and enums."""
    comments = {
        tuple(place.path): " ".join(place.leading_comments.split())
        for place in file.source_code_info.location
    }

    def service(each: ServiceDescriptorProto, path: tuple[int, ...]) -> Part:
        calls = []
        for i, call in enumerate(each.method):
            sent = "stream " * call.client_streaming + _short(call.input_type)
            got = "stream " * call.server_streaming + _short(call.output_type)
            comment = comments[(*path, MEMBER, i)]
            calls.append(Member(call.name, f"{sent} → {got}", comment))
        return Part(each.name, "service", comments[path], tuple(calls))

    def message(each: DescriptorProto, path: tuple[int, ...], outer: str = "") -> Iterator[Part]:
        name = outer + each.name
        members = []
        for i, field in enumerate(each.field):
            oneof = None
            if field.HasField("oneof_index") and not field.proto3_optional:
                decl = each.oneof_decl[field.oneof_index].name
                comment = comments[(*path, ONEOF, field.oneof_index)]
                oneof = Member(decl, "oneof", comment)
            comment = comments[(*path, MEMBER, i)]
            members.append(Member(field.name, _type_of(field, each), comment, field, oneof))
        yield Part(name, "message", comments[path], tuple(members))
        for i, inner in enumerate(each.nested_type):
            if not inner.options.map_entry:
                yield from message(inner, (*path, NESTED, i), f"{name}.")
        for i, inner_enum in enumerate(each.enum_type):
            yield enum(inner_enum, (*path, NESTED_ENUM, i), f"{name}.")

    def enum(each: EnumDescriptorProto, path: tuple[int, ...], outer: str = "") -> Part:
        values = (
            Member(value.name, str(value.number), comments[(*path, MEMBER, i)])
            for i, value in enumerate(each.value)
        )
        return Part(outer + each.name, "enum", comments[path], tuple(values))

    yield from (service(each, (SERVICE, i)) for i, each in enumerate(file.service))
    for i, each in enumerate(file.message_type):
        yield from message(each, (MESSAGE, i))
    yield from (enum(each, (ENUM, i)) for i, each in enumerate(file.enum_type))


@cache
def messages() -> dict[str, Part]:
    """By name, without the package."""
    found = (part for file in files() for part in parts(file))
    return {part.name: part for part in found if part.kind == "message"}


def _type_of(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    name = _short(field.type_name) or FieldDescriptorProto.Type.Name(field.type).lower()
    name = name.removeprefix("type_")
    for entry in message.nested_type:
        if entry.options.map_entry and field.type_name.endswith(f".{message.name}.{entry.name}"):
            key, value = (_type_of(each, entry) for each in entry.field)
            return f"map<{key}, {value}>"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _short(name: str) -> str:
    return name.removeprefix(".").removeprefix("mintrpc.v1.")

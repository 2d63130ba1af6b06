"""The contract as its baseline has it, which no later server or client may break."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool

ROOT = Path(__file__).parents[1]


def client_calls() -> set[str]:
    """The RPCs whose requests the client makes, by the names of their messages."""
    made = re.compile(r"\b(?:model|trainer|sampler|checkpoint)_pb2\.(\w+)Request\b")
    sources = (ROOT / "py_client/mint").rglob("*.py")
    return {name for file in sources for name in made.findall(file.read_text())}


@cache
def pool() -> DescriptorPool:
    files = FileDescriptorSet.FromString((ROOT / "proto/baseline.binpb").read_bytes())
    found = DescriptorPool()
    for file in files.file:
        found.AddSerializedFile(file.SerializeToString())
    return found


def method(path: str) -> MethodDescriptor:
    """Of `/mintrpc.v1.SomeService/SomeCall`."""
    service, _, name = path.removeprefix("/").partition("/")
    return pool().FindServiceByName(service).methods_by_name[name]


def has(field: FieldDescriptor) -> bool:
    assert field.containing_type is not None
    try:
        return (
            field.name
            in pool().FindMessageTypeByName(field.containing_type.full_name).fields_by_name
        )
    except KeyError:
        return False


def new_values(field: FieldDescriptor) -> set[str]:
    """The values of an enum that the baseline's does not have."""
    assert field.enum_type is not None
    known = pool().FindEnumTypeByName(field.enum_type.full_name).values_by_name
    return set(field.enum_type.values_by_name) - set(known)


def fields_of(kind: Descriptor, seen: set[str] | None = None) -> Iterator[FieldDescriptor]:
    """All fields of a message, those of the messages in it too."""
    seen = set() if seen is None else seen
    if kind.full_name in seen:
        return
    seen.add(kind.full_name)
    for field in kind.fields:
        yield field
        if field.message_type is not None:
            yield from fields_of(field.message_type, seen)

"""What docs/languages/ says of the contract is there, also where nothing runs the page."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, ServiceDescriptor

from mint_core.rpc.errors import DOMAIN, NEXT_SEQUENCE
from mint_core.rpc.limits import MAX_MESSAGE_BYTES
from sampler_service.config import SamplerConfig
from trainer_service.config import TrainerConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "languages").glob("*.md"))
PROTOS = sorted((ROOT / "proto" / "mintrpc" / "v1").glob("*.proto"))
RUST = (ROOT / "docs" / "languages" / "rust.md").read_text()
CODE = "\n".join(re.findall(r"```rust\n(.*?)```", RUST, re.DOTALL))
# What the code takes from elsewhere: the language, tonic, its messages of errors.
FOREIGN = """
A Ascii Bearer Certificate ClientTlsConfig Clone Default Duration Endpoint Err ErrorInfo F Fn Future
HOST HashMap Identity MAX MetadataValue Ok Output PORT Q Request Response Result Sends Some Status
StatusExt
"""


def described() -> Iterator[Descriptor | EnumDescriptor | ServiceDescriptor]:
    for proto in PROTOS:
        module = importlib.import_module(f"mintrpc.v1.{proto.stem}_pb2")
        yield from module.DESCRIPTOR.message_types_by_name.values()
        yield from module.DESCRIPTOR.enum_types_by_name.values()
        yield from module.DESCRIPTOR.services_by_name.values()


KNOWN = {each.name: each for each in described()}
MESSAGES = {name: each for name, each in KNOWN.items() if isinstance(each, Descriptor)}
ENUMS = {name: each for name, each in KNOWN.items() if isinstance(each, EnumDescriptor)}
SERVICES = {name: each for name, each in KNOWN.items() if isinstance(each, ServiceDescriptor)}


def camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def literals() -> Iterator[tuple[str, set[str]]]:
    """The messages that the code makes, each with the fields that it sets."""
    for match in re.finditer(r"\b([A-Z]\w+) \{", CODE):
        if match[1] not in MESSAGES:
            continue
        depth, body = 1, ""
        for character in CODE[match.end() :]:
            depth += (character in "{(") - (character in "})")
            if depth == 0:
                break
            body += character if depth == 1 else ""
        body = re.sub(r"//.*", "", body)
        yield match[1], set(re.findall(r"(?:^|,)\s*(\w+)\s*(?=[:,]|\s*$)", body))


def test_messages_of_the_rust_page_have_the_fields_that_it_sets() -> None:
    found = dict(literals())
    assert {"OptimStepRequest", "AdamParams", "TensorData", "ModelInputChunk"} <= found.keys()
    for name, names in found.items():
        message = MESSAGES[name]
        assert names <= {*message.fields_by_name, *message.oneofs_by_name}, name
    assert {"training_run_id", "writer_epoch", "sequence"} <= found["OptimStepRequest"]


def test_services_and_methods_of_the_rust_page_are_there() -> None:
    clients = re.findall(r"\b(\w+Service)Client\b", CODE)
    methods = re.findall(r"\.(\w+)\(sent\)", CODE)
    known = {snake(method.name) for name in clients for method in SERVICES[name].methods}
    assert clients
    assert methods
    assert set(methods) <= known


def test_enums_and_oneofs_of_the_rust_page_are_there() -> None:
    values = re.findall(r"\b([A-Z]\w+)::(\w+)\.into\(\)", CODE)
    oneofs = re.findall(r"\b([a-z_]+)::([A-Z]\w+)::([A-Z]\w+)\(", CODE)
    assert values
    assert len(oneofs) > 1
    for enum, value in values:
        prefix = f"{snake(enum)}_".upper()
        assert f"{prefix}{snake(value).upper()}" in ENUMS[enum].values_by_name
    for module, oneof, variant in oneofs:
        groups = MESSAGES[camel(module)].oneofs_by_name.values()
        variants = {camel(g.name): {camel(f.name) for f in g.fields} for g in groups}
        assert variant in variants[oneof]
    for value in re.findall(r"`([A-Z]+(?:_[A-Z0-9]+)+)`", RUST):
        assert any(value in enum.values_by_name for enum in ENUMS.values()), value


def test_every_other_name_of_the_rust_page_is_of_another_library() -> None:
    inside = {camel(m.name) for s in SERVICES.values() for m in s.methods}
    for message in MESSAGES.values():
        inside |= {camel(o.name) for o in message.oneofs} | {camel(f.name) for f in message.fields}
    for enum in ENUMS.values():
        size = len(snake(enum.name)) + 1
        inside |= {camel(value.name[size:]) for value in enum.values}
    clients = {f"{name}Client" for name in SERVICES}
    others = set(re.findall(r"\b[A-Z]\w*", CODE)) - set(KNOWN) - inside - clients
    assert others == set(FOREIGN.split())


def test_files_and_constants_of_the_rust_page_are_the_contracts() -> None:
    built = re.search(r"let files = \[(.*?)\]", CODE)
    assert built is not None
    assert set(re.findall(r'"(\w+)"', built[1])) <= {proto.stem for proto in PROTOS}
    package = re.search(r'include_proto!\("(.*?)"\)', CODE)
    assert package is not None
    assert f"package {package[1]};" in PROTOS[0].read_text()
    assert f'domain == "{DOMAIN}"' in CODE
    assert f'get("{NEXT_SEQUENCE}")' in CODE
    assert "max_message_bytes" in MESSAGES["Limits"].fields_by_name
    assert MAX_MESSAGE_BYTES > 4 * 2**20  # which the page says is what tonic takes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_ports_and_links_of_a_page_are_there(page: Path) -> None:
    known = set()
    for config in (TrainerConfig, SamplerConfig):
        defaults = {each.name: each.default for each in fields(config)}
        assert defaults["address"] is not MISSING
        known.add(str(defaults["address"]).rpartition(":")[2])
    text = page.read_text()
    assert set(re.findall(r":(\d{4,5})\b", text)) <= known
    for link in re.findall(r"\]\(([^)#:]+)", text):
        assert (page.parent / link).exists(), link

"""`errors.proto` and the servers' error classes say the same, both ways."""

import ast
import re
from collections.abc import Iterator

import pytest

import mint
from mint_core.rpc.parsing import UnknownField, parse
from mintrpc.v1 import errors_pb2, trainer_pb2
from tests.unit import error_classes

PREFIX = "ERROR_REASON_"
AT_START = "STATE_UNUSABLE"  # of a server that does not start: no client hears of it
PROTO = error_classes.ROOT / "proto/mintrpc/v1/errors.proto"
VALUE = re.compile(
    r"  // (?P<code>[A-Z_]+), (?P<recorded>recorded|not recorded|recorded or not)\."
    rf"(?: Keys: (?P<keys>.*?)\.)? .*?\n  {PREFIX}(?P<reason>\w+) = \d+;"
)
CLIENTS = (mint.ServiceClient, mint.TrainingClient, mint.SamplingClient, mint.RestClient)


def values() -> Iterator[re.Match[str]]:
    text = re.sub(r"\n  // (?=[^A-Z])|(?<![;{0])\n  // ", " ", PROTO.read_text())
    yield from VALUE.finditer(text.partition("_UNSPECIFIED = 0;")[2])


def test_every_reason_is_in_the_contract_and_none_else() -> None:
    names = {name.removeprefix(PREFIX) for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118
    reasons = {reason for _, _, reason in error_classes.classes()}
    assert names - {"UNSPECIFIED"} == reasons - {AT_START}
    assert {value["reason"] for value in values()} == names - {"UNSPECIFIED"}


def test_the_contract_tells_the_code_of_each_reason() -> None:
    codes = error_classes.codes()
    assert {value["reason"]: {value["code"]} for value in values()} == {
        reason: code for reason, code in codes.items() if reason != AT_START
    }


def test_the_contract_tells_the_keys_of_each_reason() -> None:
    keys = error_classes.keys()
    for value in values():
        told, raised = value["keys"] or "", keys[value["reason"]]
        names = set(re.findall(r"`(\w+)`", told))
        if value["reason"] == "UNKNOWN_FIELD":
            continue  # which is raised under another name: see below
        if told.endswith("others") or told == "vary":
            assert names <= raised, value["reason"]
        else:
            assert names == raised, value["reason"]


def test_no_message_names_a_function_of_one_languages_client() -> None:
    calls = {name for client in CLIENTS for name in dir(client) if callable(getattr(client, name))}
    names = sorted(name for name in calls if "_" in name.strip("_"))
    word = re.compile(rf"\b({'|'.join(names)})\b")
    found = [
        (source.module, text)
        for source in error_classes.sources()
        for text in sentences(source.tree)
        if word.search(text)
    ]
    assert not found


def sentences(tree: ast.Module) -> Iterator[str]:
    """Texts that are no docstrings and have more than one word."""
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and " " in text and id(node) not in docstrings:
            yield text


def test_a_newer_clients_field_has_a_reason_of_its_own() -> None:
    newer = trainer_pb2.ForwardBackwardRequest(data=[{}])
    newer.data[0].MergeFromString(b"\xa0\x06\x01")  # field number 100
    with pytest.raises(UnknownField) as caught:
        parse(trainer_pb2.ForwardBackwardRequest.FromString, newer.SerializeToString())
    assert caught.value.metadata == {"field": "data[0]", "field_number": "100"}

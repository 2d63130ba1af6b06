"""What is refused of a constraint before anything compiles it."""

import json

import pytest

from mint_core.errors import InvalidRequest, Unimplemented
from mintrpc.v1 import sampler_pb2
from sampler_service import constraint_parsing
from sampler_service.constraint_parsing import parse_constraint
from sampler_service.jobs import Constraint, Stops

END = Stops(token_ids=frozenset({2}))


def parsed(stops: Stops = END, **fields: str) -> Constraint | None:
    return parse_constraint(sampler_pb2.SamplingParams(**fields), stops)  # type: ignore[arg-type]


def test_a_constraint_arrives_with_the_name_of_its_field() -> None:
    assert parsed() is None
    assert parsed(regex="a\\\\") == Constraint("regex", "sampling_params.regex", "a\\\\")
    schema = parsed(json_schema='{"const": "\u00e9"}')
    assert schema is not None
    assert (schema.kind, schema.field) == ("json_schema", "sampling_params.json_schema")
    assert json.loads(schema.text) == {"const": "\u00e9"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"regex": ""}, "is empty"),
        ({"regex": "a\\"}, "lone backslash"),
        ({"json_schema": ""}, "is empty"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": '{"const": NaN}'}, "is not JSON: NaN"),
        ({"json_schema": "[" * 60_000}, "is not JSON"),
        (
            {"json_schema": '{"items": {"minimum": -9223372036854775808}}'},
            "a `minimum` of -9223372",
        ),
        ({"json_schema": '{"allOf": [{"exclusiveMaximum": 1e400}]}'}, "`exclusiveMaximum` of inf"),
        ({"json_schema": f'{{"maximum": {10**400}}}'}, "a `maximum` of 1000000"),
        ({"json_schema": '{"x-guidance": {"lenient": true}}'}, "x-guidance"),
    ],
)
def test_what_cannot_be_a_constraint_is_refused_by_name(fields: dict[str, str], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        parsed(**fields)
    assert caught.value.metadata["field"] == f"sampling_params.{next(iter(fields))}"


def test_a_constraint_needs_a_token_that_ends_what_matches() -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        parsed(Stops(texts=("x",)), regex="a")


def test_without_the_library_constraints_are_unimplemented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_parsing, "find_spec", lambda name: None)
    with pytest.raises(Unimplemented, match="leave it out") as caught:
        parsed(regex="a")
    assert caught.value.metadata == {"feature": "constraints", "field": "sampling_params.regex"}
    assert parsed() is None

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


def read_schema(schema: object) -> object:
    constraint = parsed(json_schema=json.dumps(schema))
    assert constraint is not None
    return json.loads(constraint.text)


def test_counts_may_be_whole_numbers_of_any_spelling() -> None:
    schema = {
        "properties": {"maxLength": {"type": "string", "maxLength": 3.0}},
        "minItems": 1.0,
        "const": {"maxItems": 2.0},
        "maxItems": 2.5,
    }
    read = json.dumps(read_schema(schema))
    assert read == json.dumps(schema).replace("3.0", "3").replace("1.0", "1")


def tagged(tag: object, **more: object) -> dict[str, object]:
    return {"type": "object", "properties": {"k": tag, **more}, "required": ["k"]}


ONE, TWO = {"const": 1}, {"const": 2}
REFERRED = {"a": tagged(ONE), "b": {"$ref": "#/$defs/c~1d"}, "c/d": tagged({"enum": [2, 3]})}


@pytest.mark.parametrize(
    "options",
    [
        [ONE, TWO, {"const": True}, {"const": "1"}, {"const": None}, {"const": [1]}],
        [{"enum": [1, 2]}, {"enum": [3.5, {"a": 1}]}, {"const": {"a": 2}}],
        [tagged(ONE), tagged(TWO), {"type": "array"}],
        [tagged(ONE), tagged({"type": "string"}), tagged({"type": "integer", "minimum": 2})],
        [tagged(tagged(ONE)), tagged(tagged(TWO))],
        [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        [{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 6, "maximum": 9}],
        [{"type": "number", "exclusiveMaximum": 5}, {"type": "number", "minimum": 5.0}],
        [{"type": ["integer", "null"], "maximum": 5}, {"const": 6}, {"type": "string"}],
        [],
    ],
)
def test_options_that_exclude_each_other_are_any_of_them(options: list[object]) -> None:
    schema = {"items": {"oneOf": options}, "$defs": REFERRED}
    assert read_schema(schema) == {"items": {"anyOf": options}, "$defs": REFERRED}


@pytest.mark.parametrize(
    "options",
    [
        [ONE, {"const": 1.0}],
        [{"enum": [1, 2]}, {"enum": [2, 3]}],
        [{"type": "number"}, {"type": "integer"}],
        [{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 5}],
        [{"type": "integer", "maximum": 5}, {"minimum": 6}, {"type": "string"}],
        [{"type": "integer", "maximum": 5}, {"const": 4}],
        # What is no object matches both.
        [{"properties": {"k": ONE}, "required": ["k"]}, {"properties": {"k": TWO}}],
        [{**tagged(ONE), "required": []}, {**tagged(TWO), "required": []}],
        [{"$ref": "#/$defs/loop"}, ONE],
        [{"$ref": "elsewhere"}, {"type": "string"}],
        [True, ONE],
        [{"type": "object", "required": [["k"]], "properties": [3]}, {"type": "object"}],
        [{"type": "integer", "minimum": i} for i in range(400)],
        ONE,
    ],
)
def test_options_that_may_share_a_match_are_left_to_the_compiler(options: object) -> None:
    schema = {"oneOf": options, "$defs": {"loop": {"$ref": "#/$defs/loop"}}}
    assert read_schema(schema) == schema


def test_what_only_looks_like_a_schema_is_left_alone() -> None:
    schema = {"const": {"oneOf": [ONE, TWO]}, "properties": {"oneOf": {"type": "string"}}}
    assert read_schema(schema) == schema


def test_a_constraint_needs_a_token_that_ends_what_matches() -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        parsed(Stops(texts=("x",)), regex="a")


def test_without_the_library_constraints_are_unimplemented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_parsing, "find_spec", lambda name: None)
    with pytest.raises(Unimplemented, match="leave it out") as caught:
        parsed(regex="a")
    assert caught.value.metadata == {"feature": "constraints", "field": "sampling_params.regex"}
    assert parsed() is None

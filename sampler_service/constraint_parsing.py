"""Constraints on a continuation's text: what can be said of them without compiling them."""

import json
from importlib.util import find_spec
from typing import Any, NoReturn

from mint_core.errors import InvalidRequest, Unimplemented
from mintrpc.v1 import sampler_pb2
from sampler_service.jobs import Constraint, Stops
from sampler_service.plain_schema import make_plain

# The compiler's own key: it can turn refusals of what is not understood into silence.
COMPILER_OPTIONS = "x-guidance"

# Of numbers; the compiler takes those beyond 64 bits for the nearest.
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


def constraints_served() -> bool:
    """Whether the library that compiles them is installed: images of GPU machines may lack it."""
    return find_spec("llguidance") is not None


def parse_constraint(params: sampler_pb2.SamplingParams, stops: Stops) -> Constraint | None:
    """What the text must match; None if it is free."""
    name = params.WhichOneof("constraint")
    if name is None:
        return None
    field = f"sampling_params.{name}"
    if not constraints_served():
        raise Unimplemented(
            f"`{field}` is not served here, where llguidance is not installed; leave it out",
            feature="constraints",
            field=field,
        )
    text = getattr(params, name)
    if not text:
        raise InvalidRequest(f"`{field}` is empty; give it a text, or leave it out", field=field)
    if not stops.token_ids:
        raise InvalidRequest(
            f"`{field}` needs a token to end the text with, and `ignore_eos` leaves none; leave it "
            "out, or give `stop_token_ids`",
            field=field,
        )
    return Constraint(name, field, (_regex if name == "regex" else _schema)(text, field))


def _regex(text: str, field: str) -> str:
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise InvalidRequest(f"`{field}` ends in a lone backslash; double it", field=field)
    return text


def _schema(text: str, field: str) -> str:
    """The schema, in ASCII without what JSON does not know."""

    def check_bounds(found: dict[str, Any]) -> dict[str, Any]:
        for name in BOUNDS & found.keys():
            if type(found[name]) in (int, float) and not -(2**63) < found[name] < 2**63:
                raise InvalidRequest(
                    f"`{field}` has a `{name}` of {str(found[name])[:40]}, which is beyond what is "
                    "followed here: bounds are between -2**63 and 2**63; leave it out",
                    field=field,
                )
        return found

    def refuse(problem: object) -> NoReturn:
        raise InvalidRequest(f"`{field}` is not JSON: {problem}; send a JSON schema", field=field)

    try:
        schema: Any = json.loads(text, parse_constant=refuse, object_hook=check_bounds)
        make_plain(schema)
    except (ValueError, RecursionError) as error:
        refuse(error)
    if isinstance(schema, dict) and COMPILER_OPTIONS in schema:
        raise InvalidRequest(
            f"`{field}` has `{COMPILER_OPTIONS}`, which cannot be set here; leave it out",
            field=field,
        )
    return json.dumps(schema)

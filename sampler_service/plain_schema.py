"""JSON schemas in the words that the compiler of constraints understands, saying what they said."""

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any, TypeVar

# Whose values have schemas by name, and whose value is none.
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_DATA = {"const", "enum", "default", "examples"}
_COUNTS = {f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Properties")}
_MOST_COMPARISONS = 5_000  # of one schema: some tens of milliseconds
_MOST_DEPTH = 8  # of references, and of properties in properties
_KINDS = {bool: "boolean", str: "string", list: "array", dict: "object", type(None): "null"}
_ALL_KINDS = {*_KINDS.values(), "number"}

C = TypeVar("C", dict[str, Any], list[Any])


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all in it, those that are true or false left out."""
    waiting = [schema]
    while waiting:
        found = waiting.pop()
        if not isinstance(found, dict):
            continue
        yield found
        for key, value in found.items():
            if key in _BY_NAME and isinstance(value, dict):
                waiting += value.values()
            elif key not in _DATA:
                waiting += value if isinstance(value, list) else [value]


def make_plain(schema: Any) -> None:
    """Changes a schema in place: counts that are whole are integers, and `oneOf` is `anyOf` where
    nothing matches two of its options. The compiler sees that of types and texts alone.
    """
    options = _Options(schema)
    for found in subschemas(schema):
        for key in _COUNTS & found.keys():
            if isinstance(found[key], float) and found[key].is_integer():
                found[key] = int(found[key])
        if "anyOf" not in found and options.exclude_each_other(found.get("oneOf")):
            found["anyOf"] = found.pop("oneOf")


class _Options:
    """Tells whether nothing matches two schemas, or may not see it. It never says so wrongly: all
    that is in a schema must hold, so what is not looked at could only exclude more.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = _MOST_COMPARISONS

    def exclude_each_other(self, options: Any) -> bool:
        if not isinstance(options, list):
            return False
        listed = [_values(option) for option in options]
        if None not in listed:  # in linear time: there may be many
            texts = [text for values in listed for text in values or ()]
            return len(texts) == len(set(texts))
        return all(self._exclude(a, b, _MOST_DEPTH) for a, b in combinations(options, 2))

    def _exclude(self, a: Any, b: Any, depth: int) -> bool:
        self._left -= 1
        if self._left < 0 or not depth:
            return False
        a, b = self._resolved(a), self._resolved(b)
        mine, theirs = _values(a), _values(b)
        if mine is not None and theirs is not None:
            return not mine.keys() & theirs.keys()
        if mine is not None:
            return all(self._exclude(_exactly(value), b, depth - 1) for value in mine.values())
        if theirs is not None:
            return self._exclude(b, a, depth)
        both = _kinds(a) & _kinds(b)
        return both <= {"number", "object"} and (
            ("number" not in both or _ends_before(a, b) or _ends_before(b, a))
            and ("object" not in both or self._differ_in_a_property(a, b, depth))
        )

    def _differ_in_a_property(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        mine, theirs = (_own(of, "properties", dict) for of in (a, b))
        required = [*_own(a, "required", list), *_own(b, "required", list)]
        return any(
            self._exclude(mine[name], theirs[name], depth - 1)
            for name in required
            if isinstance(name, str) and name in mine and name in theirs
        )

    def _resolved(self, schema: Any) -> dict[str, Any]:
        """The schema, or what it refers to in the same text; {}, which all matches, if it is none
        that is looked at here.
        """
        for _ in range(_MOST_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            steps = str(schema["$ref"]).split("/")
            schema = self._root if steps[0] == "#" else {}
            for step in steps[1:]:
                name = step.replace("~1", "/").replace("~0", "~")
                schema = schema.get(name) if isinstance(schema, dict) else None
        return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def _own(schema: dict[str, Any], key: str, kind: type[C]) -> C:
    """What it has there, or nothing if that is of another type."""
    found = schema.get(key)
    return found if isinstance(found, kind) else kind()


def _values(schema: Any) -> dict[str, Any] | None:
    """All that it can match, if they are listed, by a text that equal ones share."""
    if not isinstance(schema, dict):
        return None
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return {_text(value): value for value in listed} if isinstance(listed, list) else None


def _exactly(value: Any) -> dict[str, Any]:
    """What matches no other value, but perhaps others of its type, without listing it."""
    kind = _KINDS.get(type(value), "number")
    return {"type": kind} | ({"minimum": value, "maximum": value} if kind == "number" else {})


def _kinds(schema: dict[str, Any]) -> set[str]:
    """Types of what it can match; integers are numbers."""
    named = schema.get("type", list(_ALL_KINDS))
    names = named if isinstance(named, list) else [named]
    return {"number" if name == "integer" else str(name) for name in names}


def _ends_before(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether its largest number is less than the other's least."""
    most = min(_ends(one, ("maximum", 0), ("exclusiveMaximum", -1)), default=None)
    least = max(_ends(other, ("minimum", 0), ("exclusiveMinimum", 1)), default=None)
    if most is None or least is None:
        return False
    return most[0] < least[0] or (most[0] == least[0] and bool(most[1] or least[1]))


def _ends(schema: dict[str, Any], *keys: tuple[str, int]) -> list[tuple[float, int]]:
    return [(schema[key], open) for key, open in keys if type(schema.get(key)) in (int, float)]


def _text(value: Any) -> str:
    """The same of values that are equal, which 1 and 1.0 are, and 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{json.dumps(k)}:{_text(value[k])}' for k in sorted(value))}}}"
    return json.dumps(value)

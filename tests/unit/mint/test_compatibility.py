"""docs/compatibility.md says the truth about every public name."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

import mint
from mint import types
from mint._transport.opening import VARIABLES
from mintrpc.v1 import trainer_pb2

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs/compatibility.md"
STATES = {"same", "stricter", "more", "absent"}
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient")
_OTHER_NAMES = re.compile(r"the names of `([\w.]+)`")
_THAT_OF = re.compile(r"that of `([\w.]+)`")
_ROW = re.compile(r"\| `([^`]+)` \| (\w+) \| (.*?) ?\|")
_MISSING = object()


@dataclass(frozen=True)
class Row:
    name: str  # dotted, without parameters
    parameters: str | None  # as in a signature; None: none are given
    state: str
    note: str

    def __str__(self) -> str:
        return self.name if self.parameters is None else f"{self.name}({self.parameters})"


def rows(section: str) -> list[Row]:
    return [row for title, row in all_rows() if title == section]


def all_rows() -> Iterator[tuple[str, Row]]:
    title = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif match := _ROW.fullmatch(line):
            name, _, parameters = match[1].partition("(")
            given = parameters.removesuffix(")") if "(" in match[1] else None
            yield title, Row(name, given, match[2], match[3])
        else:
            assert not line.startswith("| `"), f"not a row: {line}"


def resolve(name: str) -> Any:
    """What a name of the tables is, or _MISSING."""
    parts = (
        name.split(".")
        if name.startswith("mint.") or name == "mint"
        else ["mint", *name.split(".")]
    )
    value: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=2):
        found = getattr(value, part, _MISSING)
        if found is _MISSING and part in getattr(value, "__annotations__", {}):
            found = part  # an attribute of its instances
        if found is _MISSING and inspect.ismodule(value):
            try:
                found = importlib.import_module(".".join(parts[:index]))
            except ModuleNotFoundError:
                return _MISSING
        if found is _MISSING:
            return _MISSING
        value = found
    return value


NAMES = [row for title, row in all_rows() if title not in ("Losses", "Environment", "Habits")]


def test_every_row_has_a_state_and_stands_once() -> None:
    everything = [str(row) for _, row in all_rows()]

    assert len(everything) > 250
    assert sorted({name for name in everything if everything.count(name) > 1}) == []
    assert {row.state for _, row in all_rows()} <= STATES
    assert not [row for _, row in all_rows() if row.state == "absent" and not row.note]


@pytest.mark.parametrize("row", [row for row in NAMES if row.state != "absent"], ids=str)
def test_what_the_table_promises_is_there(row: Row) -> None:
    value = resolve(row.name)
    assert value is not _MISSING
    if row.parameters is None:
        return
    ours = list(inspect.signature(value).parameters.values())
    if ours and ours[0].name == "self":
        ours = ours[1:]
    promised = ast.parse(f"def f({row.parameters}): ...").body[0]
    assert isinstance(promised, ast.FunctionDef)
    names = [argument.arg for argument in promised.args.args]
    defaults = [inspect.Parameter.empty] * (len(names) - len(promised.args.defaults))
    defaults += [ast.literal_eval(default) for default in promised.args.defaults]
    assert [p.name for p in ours[: len(names)]] == names
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours[: len(names)])
    for parameter, default in zip(ours, defaults, strict=False):
        if default is not inspect.Parameter.empty:
            assert parameter.default == default, parameter.name
    for argument, wanted in zip(promised.args.kwonlyargs, promised.args.kw_defaults, strict=True):
        ours_too = inspect.signature(value).parameters[argument.arg]
        assert wanted is not None
        assert ours_too.default == ast.literal_eval(wanted), argument.arg
    needed = [p.name for p in ours[len(names) :] if p.default is p.empty]
    assert all(p.kind is p.VAR_KEYWORD for p in ours if p.name in needed)


NAMESPACES = [row for row in rows("Namespaces") if row.state != "absent"]


@pytest.mark.parametrize(
    "row", [row for row in NAMESPACES if inspect.ismodule(resolve(row.name))], ids=str
)
def test_a_namespace_can_be_imported_and_has_the_names_it_stands_for(row: Row) -> None:
    assert importlib.import_module(row.name) is resolve(row.name)
    meant = _OTHER_NAMES.search(row.note)
    if meant is None:
        return
    listed = {r.name for r in NAMES if r.state != "absent"}
    inside = f"{meant[1]}."  # what the tables say is there, and what is
    names = {n.removeprefix(inside) for n in listed if n.startswith(inside)}
    names = {n for n in names if "." not in n and not inspect.ismodule(resolve(inside + n))}
    names |= set(importlib.import_module(meant[1]).__all__)

    assert {n for n in names if resolve(f"{row.name}.{n}") is not resolve(inside + n)} == set()


@pytest.mark.parametrize("row", [row for row in NAMESPACES if _THAT_OF.search(row.note)], ids=str)
def test_a_name_in_two_places_is_the_same_object(row: Row) -> None:
    meant = _THAT_OF.search(row.note)
    assert meant is not None
    assert resolve(row.name) is resolve(f"{meant[1]}.{row.name.rpartition('.')[2]}")


@pytest.mark.parametrize("row", [row for row in NAMES if row.state == "absent"], ids=str)
def test_what_the_table_calls_absent_is_absent(row: Row) -> None:
    value = resolve(row.name)
    if row.parameters is None:
        assert value is _MISSING
    else:
        assert row.parameters not in inspect.signature(value).parameters


def test_methods_of_clients_have_their_twins() -> None:
    methods = [
        row
        for row in NAMES
        if row.state != "absent"
        and row.name.partition(".")[0] in CLIENTS
        and inspect.isfunction(resolve(row.name))
    ]

    assert len(methods) > 20
    for row in methods:
        has_twin = resolve(f"{row.name}_async") is not _MISSING
        assert has_twin == ("no twin" not in row.note), row.name


def public(kind: Any) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_") and not name.endswith("_async")}


def test_no_public_name_is_missing_from_the_tables() -> None:
    listed = {row.name for row in NAMES if row.state != "absent"}
    wanted = {f"mint.{name}" if name.startswith("__") else name for name in mint.__all__}
    wanted |= {name if name in mint.__all__ else f"types.{name}" for name in types.__all__}
    for client in (*CLIENTS, "APIFuture", "ModelInput", "TensorData"):
        kind = getattr(mint, client, None)
        if kind is not None:
            wanted |= {f"{client}.{name}" for name in public(kind) if not name.endswith("_proto")}
    for module in ("mint.recipe", "mint.recipe.renderers"):
        names = importlib.import_module(module).__all__
        wanted |= {f"{module}.{name}" for name in names}
    wanted -= {"ModelInput.chunks"}

    assert sorted(wanted - listed) == []


def test_losses_are_those_of_the_table() -> None:
    table = rows("Losses")
    contract = trainer_pb2.ForwardBackwardRequest.DESCRIPTOR.oneofs_by_name["loss_fn"]
    losses = {field.name for field in contract.fields}

    assert losses == set(get_args(types.LossFnType))
    assert {row.name for row in table if row.state != "absent"} == losses
    assert len(table) > len(losses)


def test_the_environment_is_that_of_the_table() -> None:
    table = rows("Environment")

    assert {row.name for row in table if row.state != "absent"} == set(VARIABLES)

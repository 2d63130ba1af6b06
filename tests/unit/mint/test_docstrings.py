"""Every public name of the client says what it is."""

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import mint
from mint import errors, types

CONVERSIONS = {"to_proto", "from_proto", "from_run"}  # for the package itself


def undocumented(owner: Any, name: str) -> Iterator[str]:
    """The names of a module or class, and those of its classes, that have no docstring."""
    for each, value in vars(owner).items():
        inner = getattr(value, "__func__", value)
        ours = getattr(inner, "__module__", "mint").startswith("mint")
        known = isinstance(value, property) or inspect.isfunction(inner) or inspect.isclass(inner)
        if each.startswith("_") or each in CONVERSIONS or not known or not ours:
            continue
        if not inspect.getdoc(inner):
            yield f"{name}.{each}"
        if inspect.isclass(inner) and isinstance(owner, ModuleType):
            yield from undocumented(inner, f"{name}.{each}")


@pytest.mark.parametrize("module", [mint, types, errors])
def test_every_public_name_is_documented(module: ModuleType) -> None:
    assert list(undocumented(module, module.__name__)) == []


def test_one_that_is_not_is_found() -> None:
    class Bare:
        def method(self) -> None: ...

    Bare.method.__module__ = "mint"
    assert list(undocumented(Bare, "Bare")) == ["Bare.method"]

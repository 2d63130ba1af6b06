"""The error classes of the servers, read from their sources: reasons, statuses, metadata."""

import ast
import functools
import importlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mint_core import errors
from mint_core.rpc.errors import code_of

ROOT = Path(__file__).parents[2]
PACKAGES = ("mint_core", "checkpoint_store", "trainer_service", "sampler_service")
_OPTIONS = {"retry_after_s", "at_work", "passes"}  # of errors, beside their metadata


@dataclass(frozen=True, slots=True)
class Source:
    module: str
    tree: ast.Module


@functools.cache
def sources() -> tuple[Source, ...]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append(Source(module, ast.parse(path.read_text())))
    return tuple(found)


def classes() -> Iterator[tuple[Source, ast.ClassDef, str]]:
    """Those with a reason of their own, and it."""
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                for each in node.body:
                    if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "reason":
                        yield source, node, ast.literal_eval(each.value)


def codes() -> Mapping[str, set[str]]:
    """By reason, the statuses of its classes."""
    found = defaultdict(set)
    for source, node, reason in classes():
        kind = getattr(importlib.import_module(source.module), node.name)
        found[reason].add(code_of(kind.__new__(kind)).name)
    return found


def keys() -> Mapping[str, set[str]]:
    """By reason, what its classes are raised with."""
    found: dict[str, set[str]] = defaultdict(set)
    by_name: dict[str, str] = {}
    for _, node, reason in classes():
        found[reason]
        init = next((f for f in node.body if getattr(f, "name", "") == "__init__"), None)
        if init is not None and issubclass_of_base(node.name):
            for function, words in _keywords(init):
                found[reason] |= words if function == "super().__init__" else set()
        else:
            by_name[node.name] = reason
    for source in sources():
        for function, words in _keywords(source.tree):
            if reason := by_name.get(function.removeprefix("errors.")):
                found[reason] |= words
    return found


def issubclass_of_base(name: str) -> bool:
    return not hasattr(errors, name) or name.endswith("NotFound")


def _keywords(tree: ast.AST) -> Iterator[tuple[str, set[str]]]:
    """What each call calls, and by which names it gives metadata."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.keywords:
            names = {word.arg for word in node.keywords if word.arg}
            yield ast.unparse(node.func), names - _OPTIONS

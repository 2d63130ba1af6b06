"""The error classes of the servers, read from their sources: reasons, statuses, metadata."""

import ast
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


def sources() -> Iterator[Source]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield Source(module, ast.parse(path.read_text()))


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
        own = [] if init is None or not issubclass_of_base(node.name) else list(ast.walk(init))
        if own:
            found[reason] |= _keywords(own, "super().__init__")
        else:
            by_name[node.name] = reason
    for source in sources():
        for name, reason in by_name.items():
            nodes = list(ast.walk(source.tree))
            found[reason] |= _keywords(nodes, name) | _keywords(nodes, f"errors.{name}")
    return found


def issubclass_of_base(name: str) -> bool:
    return not hasattr(errors, name) or name.endswith("NotFound")


def _keywords(nodes: list[ast.AST], function: str) -> set[str]:
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == function]
    names = {word.arg for call in calls for word in call.keywords if word.arg}
    return names - _OPTIONS

"""The tests that docs/security.md names are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "security.md").read_text().partition("the test that holds it\n")[2]
HOLDERS = [row.split(" | ")[1] for row in TABLE.splitlines() if row.startswith("| ")][1:]
NAMES = {name for holders in HOLDERS for name in re.findall("`([^`]+)`", holders)}
TESTS = [
    f"/{file.relative_to(ROOT)}::{node.name}"
    for file in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_it_is_there(name: str) -> None:
    ending = f"/{name}" if "::" in name else f"::{name}"
    assert [test for test in TESTS if test.endswith(ending)]

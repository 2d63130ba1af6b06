"""The tests that tables of what was found name, in docs/, are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = re.escape("| what was wrong | held by |\n|---|---|\n")
TABLES = {
    (file.name, row)
    for file in (ROOT / "docs").glob("*.md")
    for table in re.findall(HEAD + r"((?:\|.*\n)+)", file.read_text())
    for row in table.splitlines()
}
NAMES = {
    (file, name) for file, row in TABLES for name in re.findall("`([^`]+)`", row.split(" | ")[1])
}
TESTS = [
    f"/{file.relative_to(ROOT)}::{node.name}"
    for file in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


def test_each_row_names_some() -> None:
    assert {file for file, _ in TABLES} == {"security.md", "findings.md"}
    assert all(re.fullmatch(r"\| .* \| (`[^`]+`(, )?)+ \|", row) for _, row in TABLES)


@pytest.mark.parametrize(("file", "name"), sorted(NAMES))
def test_it_is_there(file: str, name: str) -> None:
    ending = f"/{name}" if "::" in name else f"::{name}"
    assert [test for test in TESTS if test.endswith(ending)]

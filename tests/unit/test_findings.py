"""What tables in docs/ name as shown or held by a test is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADS = ("| held by |", "| shown by |")


def tree(file: Path) -> list[str]:
    """The functions of a file that stand at its top."""
    nodes = ast.parse(file.read_text()).body
    return [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


FILES = sorted((ROOT / "tests").rglob("test_*.py"))
ATTACKS = tree(ROOT / "tests" / "hostile" / "attacks.py")
TESTS = [f"/{file.relative_to(ROOT)}::{name}" for file in FILES for name in tree(file)]


def holders() -> list[str]:
    """The last cells of the rows."""
    found, reading = [], False
    pages = [file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))]
    for line in "\n\n".join(pages).splitlines():
        if line.endswith(HEADS):
            reading = True
        elif not line.startswith("|"):
            reading = False
        elif reading and not line.startswith("|--"):
            found.append(line.removesuffix(" |").rpartition(" | ")[2])
    return found


NAMES = {name for cell in holders() for name in re.findall("`([^`]+)`", cell)}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_it_is_there(name: str) -> None:
    if name.endswith(".py"):
        assert [file for file in FILES if file.as_posix().endswith(f"/{name}")]
        return
    ending = f"/{name}" if "::" in name else f"::{name}"
    assert name in ATTACKS or [test for test in TESTS if test.endswith(ending)]


def test_every_row_of_these_tables_names_a_test() -> None:
    cells = holders()
    assert len(cells) > 100
    assert [cell for cell in cells if "`" not in cell] == []

"""The code of a page that mixes prose and code: the longest runs of lines that parse as Python."""

import ast


def code_blocks(text: str) -> list[str]:
    """The page's blocks of code, in order, without those that are no more than a word of prose."""
    lines = text.splitlines()
    blocks, start = [], 0
    while start < len(lines):
        end = _end_of_run(lines, start)
        block = "\n".join(lines[start:end]).strip("\n")
        if not _says_nothing(block):
            blocks.append(block)
        start = max(end, start + 1)
    return blocks


def _end_of_run(lines: list[str], start: int) -> int:
    """One past the longest run from `start` that parses; `start` if none does."""
    for end in range(len(lines), start, -1):
        if _parse("\n".join(lines[start:end])) is not None:
            return end
    return start


def _says_nothing(block: str) -> bool:
    """Whether it is empty or bare names alone: a heading of one word parses too."""
    module = _parse(block)
    return module is None or all(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Name) for node in module.body
    )


def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except SyntaxError:
        return None

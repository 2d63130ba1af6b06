"""`docs/reference.md`: every call, message and field of the contract in tables. `make reference`
writes it.
"""

from collections.abc import Iterator

from tests.contract import ROOT, Member, Part, files, parts

PAGE = ROOT / "docs/reference.md"
HEAD = """# Reference of the contract

Made from `proto/mintrpc/v1/` by `make reference`; the comments there are the source. Under
**required**: `yes`, a request is refused without it; `one of NAME`, without one of these; when;
empty, it may be left out.
"""
COLUMNS = {
    "service": ("call", "messages", ""),
    "message": ("field", "type", "required", ""),
    "enum": ("value", "number", ""),
}


def page() -> str:
    return "\n".join([HEAD, *(line for file in files() for line in _file(file))])


def _file(file: object) -> Iterator[str]:
    yield f"## {file.name}"  # type: ignore[attr-defined]
    for part in parts(file):  # type: ignore[arg-type]
        yield from _part(part)
    yield ""


def _part(part: Part) -> Iterator[str]:
    yield f"\n### {part.name}\n\n{_cell(part.comment)}\n"
    if not part.members:
        return
    columns = COLUMNS[part.kind]
    yield _row(columns)
    yield _row(["---"] * len(columns))
    for member in part.members:
        required = [_required(member)] if part.kind == "message" else []
        yield _row([f"`{member.name}`", f"`{member.type}`", *required, _cell(member.what)])


def _required(member: Member) -> str:
    if member.oneof is None:
        return member.required
    return f"{'one of' if member.oneof.required else 'at most one of'} `{member.oneof.name}`"


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())

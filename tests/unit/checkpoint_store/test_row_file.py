"""Rows in files: what was written is what is read, whole after a loss of power, and any damage is
found.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from checkpoint_store import FileEntry, parse_path, row_file
from checkpoint_store.adapter_files import verify_file
from checkpoint_store.revisions import read_manifest
from checkpoint_store.row_file import RowDamaged, RowFile, RowMissing, save_row, write_row
from mint_core.lora.row_layout import Floats
from tests.power_loss import filmed

DATA = Path(__file__).parents[2] / "data"
PAGE_BYTES = 4096
PARTS = ("weights", "gradient", "exp_avg", "exp_avg_sq")


def drawn(size: int, *parts: str) -> dict[str, Floats]:
    generator = np.random.default_rng(size)
    return {part: generator.standard_normal(size).astype(np.float32) for part in parts}


def write(folder: Path, step: int = 3) -> Path:
    path = folder / f"r-1-{step}.safetensors"
    parts = {part: np.full(40, step, np.float32) for part in ("weights", "exp_avg")}
    save_row(path, parts, {"training_run_id": "r-1", "step": str(step)})
    return path


def problem(path: Path) -> str:
    """What is wrong with a file; empty: nothing."""
    try:
        row = RowFile.open(path)
        for part in row.digests:
            row.read(part)
    except RowDamaged as error:
        return error.message
    return ""


def equal(a: Floats, b: Floats) -> bool:
    """To the bit."""
    return a.tobytes() == b.tobytes()


@given(
    size=st.integers(1, 70),
    parts=st.sets(st.sampled_from(PARTS[1:])),
    about=st.dictionaries(st.sampled_from(["step", "layout", "manifest"]), st.text()),
    bits=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_what_was_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    parts: set[str],
    about: dict[str, str],
    bits: int,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    vectors = drawn(size, *parts, "weights")
    vectors["weights"].view(np.uint32)[0] = bits  # whatever kind of number that is
    for path, writes in ((folder / "written", write_row), (folder / "saved", save_row)):
        size_bytes = writes(path, vectors, about)

        row = RowFile.open(path)
        assert row.size_bytes == size_bytes == path.stat().st_size
        assert about.items() <= row.about.items()
        assert row.digests.keys() == vectors.keys()
        for part, vector in vectors.items():
            assert equal(row.read(part), vector)
            assert equal(row.map(part), vector)


def test_numbers_begin_at_a_page_weights_first_and_safetensors_reads_them(tmp_path: Path) -> None:
    for told in ("", "x" * 3000, "x" * 5000):
        path = tmp_path / f"{len(told)}.safetensors"
        vectors = drawn(40, *PARTS[::-1])
        write_row(path, vectors, {"layout": told})

        row = RowFile.open(path)
        assert row.start % PAGE_BYTES == 0
        assert next(iter(row.digests)) == "weights"
        assert path.read_bytes()[row.start :].startswith(vectors["weights"].tobytes())
        read = load_file(path)
        assert all(equal(read[part], vector) for part, vector in vectors.items())


def test_a_mapped_row_outlives_its_file_and_a_change_of_it_stays_here(tmp_path: Path) -> None:
    row = RowFile.open(write(tmp_path))
    mapped, other = row.map("weights"), row.map("weights")
    row.path.unlink()
    other[:] = -1.0
    assert (mapped == 3).all()
    for read in (row.map, row.read):
        with pytest.raises(RowMissing, match="is not there"):
            read("weights")
    assert problem(row.path) == f"row file {row.path.name} is not there"


def test_a_file_made_beforehand_is_written_in_place_and_cut_to_its_size(tmp_path: Path) -> None:
    path = tmp_path / "draft"
    path.write_bytes(b"x" * 100_000)
    number = path.stat().st_ino
    vectors = drawn(40, "weights")

    assert write_row(path, vectors, {}) == path.stat().st_size < 100_000
    assert path.stat().st_ino == number
    assert equal(RowFile.open(path).map("weights"), vectors["weights"])


@pytest.mark.parametrize("writes", [write_row, save_row])
def test_writing_gives_a_sign_of_life_for_each_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: Any
) -> None:
    monkeypatch.setattr(row_file, "CHUNK_BYTES", 64)
    signs: list[int] = []
    path, vectors = tmp_path / "row", drawn(40, "weights", "exp_avg")

    writes(path, vectors, {}, lambda: signs.append(1))

    assert len(signs) == 2 * (1 + 3)  # the digest of each part, and 160 bytes in pieces of 64
    assert not problem(path)


def test_the_newest_row_on_disk_is_whole_at_any_moment(tmp_path: Path) -> None:
    state = tmp_path / "snapshots"
    state.mkdir()
    with filmed(state) as film:
        first = write(state, 1)
        film.note("the journal names the first")
        second = write(state, 2)
        film.note("the journal names the second")
        first.unlink()

    named = ""
    for number, moment in enumerate(film.moments):
        if moment.before.startswith("the journal names"):
            named = (second if "second" in moment.before else first).name
        for why, folder in moment.rebuilt(tmp_path / f"rebuilt-{number}"):
            rows = [path for path in folder.iterdir() if not path.name.startswith(".")]
            assert [problem(path) for path in rows] == [""] * len(rows), why
            assert not named or named in {path.name for path in rows}, why
    assert named == second.name


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    assert problem(path) == ""
    row = RowFile.open(path)
    told = len(content[: row.start].rstrip())
    # A digest under another name is none, and the file like an older one: what it says is right.
    name = content.index(b"header_digest")
    harmless = range(name, name + len(b"header_digest"))

    for offset in [*range(told), *range(told, row.start, 97), *range(row.start, len(content), 7)]:
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        if problem(path):
            continue
        # A space may become another kind of blank: the numbers are checked where they are.
        assert offset in harmless or flipped[offset] in b"\t\n\r", offset


@pytest.mark.parametrize("kept", [0, 7, 8, 100, PAGE_BYTES, -160, -1])
def test_a_torn_file_is_found(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    assert f"row file {path.name} " in problem(path)


@pytest.mark.parametrize("more", [b"\0", b"\0" * 4, b"\0" * 160])
def test_a_file_that_has_grown_is_found(tmp_path: Path, more: bytes) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    for grown in (content + more, more + content):
        path.write_bytes(grown)
        assert problem(path)


@given(content=st.binary(max_size=200), length=st.integers(0, 250))
@settings(deadline=None)
def test_anything_else_is_refused_and_nothing_else_is_raised(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "row"
    path.write_bytes(content)
    assert problem(path)
    path.write_bytes(length.to_bytes(8, "little") + content)
    assert problem(path)


def test_a_row_of_the_version_before_is_read(tmp_path: Path) -> None:
    """Written by 5cff00a: numbers drawn with seed 5, begun wherever the header ended."""
    row = RowFile.open(DATA / "saved_row_5cff00a.safetensors")
    assert row.start % PAGE_BYTES
    assert (row.about["step"], row.about["training_run_id"]) == ("3", "run-1")
    assert json.loads(row.about["engine"])["threads"] == "1"
    generator = np.random.default_rng(5)
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        expected = generator.standard_normal(41).astype(np.float32)
        assert equal(row.read(part), expected)
        assert equal(row.map(part), expected)

    again = tmp_path / "again"
    write_row(again, {part: row.read(part) for part in row.digests}, row.about)
    assert RowFile.open(again).digests == row.digests


def test_a_file_from_before_headers_had_digests_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    start = header.index(b', "header_digest"')
    older = header[:start] + header[header.index(b"}", start) :]
    path.write_bytes(len(older).to_bytes(8, "little") + older + content[8 + length :])

    assert problem(path) == ""
    assert RowFile.open(path).about["step"] == "3"


def test_another_format_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "row"
    write_row(path, drawn(4, "weights"), {"format": "mint-row-9"})
    assert "has format mint-row-9, and mint-row-1 is read here" in problem(path)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_what_this_process_lacks_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """An engine without memory ends, and another does its work: nothing is lost."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    entry = FileEntry(1, "0" * 64)
    for read in (
        lambda: RowFile.open(tmp_path / "row"),
        lambda: verify_file("mint://r/weights/a", tmp_path / "file", entry),
        lambda: read_manifest(tmp_path, parse_path("mint://r/weights/a@1")),
    ):
        with pytest.raises(MemoryError):
            read()

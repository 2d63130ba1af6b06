"""Row files of revisions: what was written is what is mapped, and nothing else is taken for one."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointDamaged, open_row, row_file
from checkpoint_store.row_file import RowMissing, write_row
from tests.unit.checkpoint_store.conftest import adapter
from tests.unit.checkpoint_store.rows import LAYOUT, snapshot, write_snapshot

MANIFEST = snapshot()
PATH = str(MANIFEST.revision_path)
OLD_FILE = Path(__file__).parents[3] / "data/memory_row_5cff00a"  # as a trainer of 5cff00a left it
OLD_PATH = "mint://r-1/sampler_weights/old@1"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "a row"
    write_snapshot(file, MANIFEST)
    return file


def refused(file: Path, why: str) -> None:
    """Reads all of a file, and expects to be told what is wrong with it."""
    with pytest.raises(CheckpointDamaged, match=f"`a row` of checkpoint `{PATH}` {why}"):
        open_row(file, PATH).weights()


def test_what_was_written_is_what_opens(file: Path) -> None:
    row = open_row(file, PATH)

    assert row.manifest == MANIFEST
    assert row.layout == LAYOUT
    assert row.file.size_bytes == file.stat().st_size
    expected = adapter()["weights"]
    weights = row.weights()
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)


def test_a_mapped_row_outlives_its_file_and_a_change_of_it_stays_here(file: Path) -> None:
    row = open_row(file, PATH)
    mapped, other = row.numbers(), row.numbers()
    before = mapped.copy()
    file.unlink()
    other[:] = -1.0
    assert np.array_equal(mapped, before)
    assert len(mapped) == LAYOUT.size
    with pytest.raises(RowMissing):
        row.numbers()


def test_a_file_cut_anywhere_is_refused_by_name(file: Path) -> None:
    content = file.read_bytes()
    for length in (0, 1, 8, 1000, *range(4096, len(content), 40_007), len(content) - 1):
        file.write_bytes(content[:length])
        refused(file, "")


def test_a_file_that_has_grown_or_lost_numbers_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for changed in (content + b"\0" * 4, content[:-4]):
        file.write_bytes(changed)
        refused(file, r"has \d+ bytes, not those")


def test_a_bit_flipped_in_a_number_is_found(file: Path) -> None:
    content = file.read_bytes()
    for at in range(open_row(file, PATH).file.start, len(content), 10_007):
        changed = bytearray(content)
        changed[at] ^= 1
        file.write_bytes(changed)
        refused(file, "has damaged weights")


def test_the_row_of_another_revision_is_refused(file: Path) -> None:
    for other in ("mint://r-1/sampler_weights/other@1", PATH.replace("@1", "@2")):
        with pytest.raises(CheckpointDamaged, match=f"is that of `{PATH}`"):
            open_row(file, other)
    with pytest.raises(RowMissing):
        open_row(file.with_name("none"), PATH)
    with pytest.raises(RowMissing):
        open_row(file / "none", PATH)


def test_a_row_without_a_revision_is_that_under_which_it_is_put(tmp_path: Path) -> None:
    named = snapshot(name="a")
    write_snapshot(tmp_path / "row", replace(named, revision=0))
    for revision in (1, 7):
        row = open_row(tmp_path / "row", str(named.path.at(revision)))
        assert row.manifest.create_time == named.create_time
    with pytest.raises(CheckpointDamaged, match="is that of `mint://r-1/sampler_weights/a`"):
        open_row(tmp_path / "row", "mint://r-1/sampler_weights/b@1")


def test_a_row_of_no_checkpoint_or_of_a_garbled_one_is_refused(file: Path) -> None:
    numbers = open_row(file, PATH).numbers()
    for about in ({}, {"manifest": "{}", "layout": "{}"}):
        write_row(file, {row_file.WEIGHTS: numbers}, about)
        refused(file, "has a manifest that is torn or not a manifest")


def test_a_row_of_the_version_before_is_refused_and_not_misread(tmp_path: Path) -> None:
    shutil.copy(OLD_FILE, tmp_path / "a row")
    with pytest.raises(CheckpointDamaged, match="is torn, or not of format mint-row-1"):
        open_row(tmp_path / "a row", OLD_PATH)

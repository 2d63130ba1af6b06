"""Row files: what was written is what is mapped, and nothing else is taken for one."""

from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointDamaged, describe_row, open_row
from tests.unit.checkpoint_store.conftest import adapter
from tests.unit.checkpoint_store.rows import LAYOUT, NUMBERS_BYTES, snapshot, write_numbers

MANIFEST = snapshot()
PATH = str(MANIFEST.revision_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "a row"
    write_numbers(file)
    describe_row(file, MANIFEST, LAYOUT)
    return file


def test_what_was_written_is_what_opens(file: Path) -> None:
    row = open_row(file, PATH)

    assert row.manifest == MANIFEST
    assert row.layout == LAYOUT
    assert row.size_bytes == file.stat().st_size
    expected = adapter()["weights"]
    weights = row.weights()
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)


def test_a_mapped_row_outlives_its_file_and_a_change_of_it_stays_here(file: Path) -> None:
    mapped, other = open_row(file, PATH).numbers(), open_row(file, PATH).numbers()
    before = mapped.copy()
    file.unlink()
    other[:] = -1.0
    assert np.array_equal(mapped, before)
    assert len(mapped) == LAYOUT.size


def test_a_file_cut_anywhere_is_refused_by_name(file: Path) -> None:
    content = file.read_bytes()
    for length in {0, 1, NUMBERS_BYTES, *range(NUMBERS_BYTES, len(content), 37), len(content) - 1}:
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointDamaged, match=r"`a row` of checkpoint .* does not end in"):
            open_row(file, PATH)


def test_a_file_that_has_grown_or_lost_numbers_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for changed in (b"\0" * 4 + content, content[4:]):
        file.write_bytes(changed)
        with pytest.raises(CheckpointDamaged, match=r"bytes where its trailer says \d+"):
            open_row(file, PATH)


def test_a_bit_flipped_in_the_header_is_found(file: Path) -> None:
    content = file.read_bytes()
    for at in range(NUMBERS_BYTES, len(content), 11):
        changed = bytearray(content)
        changed[at] ^= 1
        file.write_bytes(changed)
        with pytest.raises(CheckpointDamaged, match="`a row` of checkpoint"):
            open_row(file, PATH)


def test_the_row_of_another_revision_is_refused(file: Path) -> None:
    with pytest.raises(CheckpointDamaged, match=f"is that of `{PATH}`"):
        open_row(file, "mint://r-1/sampler_weights/other@1")
    with pytest.raises(FileNotFoundError):
        open_row(file.with_name("none"), PATH)

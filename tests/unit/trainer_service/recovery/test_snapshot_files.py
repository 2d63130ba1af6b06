"""Rows in the state folder: whole after a loss of power, and any damage found."""

from pathlib import Path

import numpy as np
import pytest

from mint_core.lora.row_digest import digest
from tests.power_loss import filmed
from trainer_service.recovery import snapshot_files
from trainer_service.recovery.snapshot_files import SnapshotDamaged, damaged_parts


def write(folder: Path, step: int) -> Path:
    path = folder / f"r-1-{step}.safetensors"
    parts = {part: np.full(40, step, np.float32) for part in ("weights", "exp_avg")}
    digests = {part: digest(vector) for part, vector in parts.items()}
    snapshot_files.write(path, parts, digests, {"training_run_id": "r-1", "step": str(step)})
    return path


def problem(path: Path) -> str:
    """What is wrong with a file; empty: nothing."""
    try:
        header = snapshot_files.read_header(path)
        return ", ".join(damaged_parts(path, header))
    except SnapshotDamaged as error:
        return error.message


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
    path = write(tmp_path, 3)
    content = path.read_bytes()
    assert problem(path) == ""
    header = snapshot_files.read_header(path)
    # A digest under another name is none, and the file like an older one: what it says is right.
    name = content.index(b"header_digest")
    harmless = range(name, name + len(b"header_digest"))

    for offset in range(len(content)):
        if offset >= header.start and offset % 7:
            continue  # of the numbers, some
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        assert problem(path) or offset in harmless, offset


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -400, -1])
def test_a_torn_file_is_found(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:kept])
    assert f"snapshot {path.name} " in problem(path)


def test_a_file_from_before_headers_had_digests_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    start = header.index(b', "header_digest"')
    older = header[:start] + header[header.index(b"}", start) :]
    path.write_bytes(len(older).to_bytes(8, "little") + older + content[8 + length :])

    assert problem(path) == ""
    assert snapshot_files.read_header(path).about["step"] == "3"

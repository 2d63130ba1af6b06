"""Files of rows: whole or not there, and gone when nobody needs them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_store import row_file
from mint_core.errors import EngineFault, FailedPrecondition
from mint_core.lora.bank import Part
from trainer_service.engine.row_files import RowFiles

VECTORS = {
    ("a", Part.WEIGHTS): torch.arange(5.0),
    ("a", Part.EXP_AVG): torch.full((5,), -0.0),
    ("b", Part.WEIGHTS): torch.ones(5),
}
PLACE = ("a", Part.EXP_AVG)
CHILD = "import sys; from pathlib import Path; from trainer_service.engine.row_files import *; "


def test_what_was_put_is_got_until_it_is_dropped(tmp_path: Path) -> None:
    files = RowFiles(tmp_path)
    for place, vector in VECTORS.items():
        files.put(place, vector)

    for place, vector in VECTORS.items():
        assert torch.equal(files.get(place, 5).view(torch.int32), vector.view(torch.int32))
    assert files.count == {Part.WEIGHTS: 2, Part.EXP_AVG: 1}
    files.drop(("a", Part.WEIGHTS))
    files.drop(("never put", Part.WEIGHTS))
    assert files.count[Part.WEIGHTS] == 1
    assert len(list(tmp_path.glob("*/*"))) == 2


def test_a_row_that_is_not_what_was_put_is_a_fault_that_names_its_run(tmp_path: Path) -> None:
    files = RowFiles(tmp_path)
    files.put(PLACE, VECTORS[PLACE])
    (path,) = tmp_path.glob("*/*")
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1  # of the last number
    for damaged, why in (
        (content[:-1], "bytes, not those it was written with"),
        (content[:-20], "bytes, not those it was written with"),
        (b"", "is torn"),
        (bytes(flipped), "has damaged exp_avg"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(
            EngineFault, match=f"exp_avg of training run `a` cannot be .* {why}"
        ) as fault:
            files.get(PLACE, 5)
        assert fault.value.metadata["training_run_id"] == "a"
    path.unlink()
    with pytest.raises(EngineFault, match="is not there"):
        files.get(PLACE, 5)


def test_each_piece_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_file, "CHUNK_BYTES", 8)
    signs: list[None] = []
    files = RowFiles(tmp_path, lambda: signs.append(None))
    files.put(PLACE, VECTORS[PLACE])
    assert len(signs) == 1 + 3  # a digest, and 20 bytes in pieces of 8
    files.get(PLACE, 5)
    assert len(signs) == 5


def test_the_files_of_a_process_that_is_gone_are_removed_and_those_of_another_stay(
    tmp_path: Path,
) -> None:
    alive = RowFiles(tmp_path)
    alive.put(PLACE, VECTORS[PLACE])
    kill = "import os; files = RowFiles(Path(sys.argv[1])); files._path('xy').touch(); os._exit(9)"
    subprocess.run([sys.executable, "-c", CHILD + kill, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2

    RowFiles(tmp_path)

    assert len(alive.get(PLACE, 5)) == 5
    assert not list(tmp_path.glob("*/x.y.row"))


def test_a_folder_that_cannot_be_made_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match=r"`row_folder` .* cannot be used"):
        RowFiles(tmp_path / "file" / "rows")

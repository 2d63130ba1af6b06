"""Folders that end with their process."""

import os
import subprocess
import sys
from pathlib import Path

from mint_core.owned_folder import OwnedFolder

DIE = """
import os, sys
from pathlib import Path
from mint_core.owned_folder import OwnedFolder
owned = OwnedFolder(Path(sys.argv[1]), "p-")
(owned.path / "left").write_text("x")
os._exit(9)
"""


def leave_one_behind(parent: Path) -> None:
    subprocess.run([sys.executable, "-c", DIE, str(parent)], check=False, timeout=60)


def test_the_folder_of_a_process_that_is_gone_is_removed_and_others_stay(tmp_path: Path) -> None:
    alive = OwnedFolder(tmp_path, "p-")
    (tmp_path / "q-other").mkdir()
    leave_one_behind(tmp_path)
    assert len(list(tmp_path.glob("p-*"))) == 2

    new = OwnedFolder(tmp_path, "p-")

    assert set(tmp_path.iterdir()) == {alive.path, new.path, tmp_path / "q-other"}


def test_what_is_worth_it_is_rescued_first(tmp_path: Path) -> None:
    leave_one_behind(tmp_path)

    new = OwnedFolder(
        tmp_path, "p-", rescue=lambda old, ours: (old / "left").rename(ours / "left") and None
    )

    assert [file.name for file in tmp_path.glob("p-*/*")] == ["left"]
    assert (new.path / "left").read_text() == "x"


def test_a_folder_can_be_removed_or_left_to_the_next(tmp_path: Path) -> None:
    removed, left = OwnedFolder(tmp_path, "p-"), OwnedFolder(tmp_path, "p-")
    removed.remove()
    left.release()
    assert list(tmp_path.iterdir()) == [left.path]

    new = OwnedFolder(tmp_path, "p-")

    assert list(tmp_path.iterdir()) == [new.path]


def test_only_its_owner_can_look_into_it(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        owned = OwnedFolder(tmp_path, "part-")
    finally:
        os.umask(before)

    assert owned.path.stat().st_mode & 0o777 == 0o700
    owned.remove()

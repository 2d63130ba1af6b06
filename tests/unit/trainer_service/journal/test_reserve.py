"""Room for deletions on a disk that is full."""

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from trainer_service.journal.reserve import Reserve

Disk = namedtuple("Disk", "f_blocks f_bavail f_frsize")


def disk_of(free: int, total: int = 1000) -> Any:
    """Blocks of 1 MiB."""
    return lambda path: Disk(total, free, 2**20)


def test_it_takes_a_share_of_what_is_free_and_gives_it_back_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", disk_of(500))
    reserve = Reserve(tmp_path)
    assert not reserve.low
    assert not reserve.release()
    reserve.hold()
    reserve.hold()
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == file.stat().st_blocks * 512 == 10 * 2**20
    assert reserve.release()
    assert not reserve.release()


def test_nothing_new_is_begun_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", disk_of(49))
    reserve = Reserve(tmp_path)
    assert reserve.low
    reserve.hold()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "statvfs", disk_of(200, total=10**6))
    assert not reserve.low
    monkeypatch.setattr(os, "statvfs", disk_of(127, total=10**6))
    assert reserve.low

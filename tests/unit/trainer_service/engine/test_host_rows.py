"""Host memory beside a GPU, whose locking of pages is counted here: it takes a GPU to do it."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mint_core.lora.bank import Part
from trainer_service.engine.host_rows import HostMemory, HostRows
from trainer_service.engine.row_files import RowFiles, RowPart

SIZE = 8  # numbers of a vector; one of twice as many is there too
BYTES = 4 * SIZE


class Pages:
    """Which memory is locked."""

    def __init__(self, most: int = 100) -> None:
        self.locked: dict[int, int] = {}  # bytes, by address
        self.count = 0
        self._most = most

    def lock(self, vector: Tensor) -> bool:
        if self.count == self._most:
            return False
        self.count += 1
        self.locked[vector.data_ptr()] = vector.nbytes
        return True

    def unlock(self, vector: Tensor) -> None:
        del self.locked[vector.data_ptr()]


def place(name: str) -> RowPart:
    return name, Part.WEIGHTS


@pytest.fixture
def files(tmp_path: Path) -> RowFiles:
    return RowFiles(tmp_path)


def test_what_comes_is_copied_into_locked_memory_which_is_used_again(files: RowFiles) -> None:
    pages = Pages()
    host = HostRows(10 * BYTES, files, HostMemory(pages.lock, pages.unlock))
    for number in range(20):
        vector = torch.full((SIZE,), float(number))
        host.put(place("a"), vector)
        kept = host.get(place("a"), SIZE)
        assert kept.data_ptr() in pages.locked
        assert torch.equal(kept, vector)
        host.drop(place("a"))
    assert pages.count == 1


def test_spare_memory_counts_and_goes_for_another_size(files: RowFiles) -> None:
    pages = Pages()
    host = HostRows(4 * BYTES, files, HostMemory(pages.lock, pages.unlock))
    for size in (SIZE, 2 * SIZE, SIZE, 4 * SIZE, SIZE):
        for name in "abcdef":
            host.put(place(name), torch.zeros(size))
            assert sum(pages.locked.values()) <= 4 * BYTES
        for name in "abcdef":
            host.drop(place(name))
    assert host.count[Part.WEIGHTS] == 0


def test_without_locks_rows_lie_in_ordinary_memory_and_it_is_said_once(
    files: RowFiles, caplog: pytest.LogCaptureFixture
) -> None:
    pages = Pages(most=1)
    host = HostRows(10 * BYTES, files, HostMemory(pages.lock, pages.unlock))
    with caplog.at_level(logging.WARNING):
        for name in "abcd":
            host.put(place(name), torch.full((SIZE,), float(ord(name))))
    assert [record.getMessage() for record in caplog.records] == [
        "host memory cannot be page-locked: rows come and go more slowly"
    ]
    for name in "abcd":
        assert host.get(place(name), SIZE)[0] == ord(name)
        host.drop(place(name))
    assert pages.count == len(pages.locked) == 1

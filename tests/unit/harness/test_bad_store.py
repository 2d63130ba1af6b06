"""What a bad store does to a process, and to nothing else."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.bad_store import BadStore

LIMIT_S = 30
# Says what comes of each name that it is told.
_PROCESS = """
import sys
from pathlib import Path
from tests.engines.bad_store import install
install(sys.argv[1])
for line in sys.stdin:
    try:
        Path(line.strip()).write_bytes(b"content")
        print("written", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


class Writer:
    def __init__(self, store: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def write(self, path: Path) -> str:
        self.ask(path)
        return self.answer()

    def ask(self, path: Path) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate(timeout=LIMIT_S)


@pytest.fixture
def bad(tmp_path: Path) -> BadStore:
    made = BadStore(tmp_path / "store")
    for folder in (made.store, made.folder):
        folder.mkdir()
    return made


def test_a_store_is_full_from_the_file_on_that_was_said_until_it_is_mended(bad: BadStore) -> None:
    writer = Writer(bad.store)
    assert writer.write(bad.store / "before") == "written"
    bad.fill(2)
    found = [writer.write(bad.store / f"file-{number}") for number in range(4)]
    assert found == ["written", "written", str(errno.ENOSPC), str(errno.ENOSPC)]
    assert writer.write(bad.store.parent / "elsewhere") == "written"
    bad.mend("full")
    assert writer.write(bad.store / "after") == "written"
    writer.close()
    assert not (bad.store / "file-2").exists()


def test_a_store_that_is_held_keeps_all_waiting_until_it_is_let_go(bad: BadStore) -> None:
    writer = Writer(bad.store)
    bad.hold()
    assert writer.write(bad.store.parent / "elsewhere") == "written"
    assert not bad.someone_waits.exists()
    writer.ask(bad.store / "file")
    while not bad.someone_waits.exists():
        pass
    assert not (bad.store / "file").exists()
    bad.mend("hold")
    assert writer.answer() == "written"
    writer.close()

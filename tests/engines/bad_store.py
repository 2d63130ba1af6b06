"""A checkpoint store that is full, slow or keeps all waiting, for processes that call `install`:
what they do to files below it goes wrong while a test's files say so. It needs no rights, no disk.
"""

import errno
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VARIABLE = "MINT_BAD_STORE"  # the store, for the children of who has installed it
LOOK_S = 0.02
_NEEDS_ROOM = ("os.mkdir", "os.link")
_OTHERS = ("os.rename", "os.remove", "os.listdir", "os.scandir")
_CREATES = os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class BadStore:
    """The test's side."""

    store: Path

    @property
    def folder(self) -> Path:
        """Of what is said, beside the store."""
        return self.store.with_name(f"{self.store.name}-trouble")

    def fill(self, left: int = 0) -> None:
        """Has it be full once each process has made that many files and folders more."""
        (self.folder / "full").write_text(str(left))

    def hold(self) -> None:
        """Has whoever comes wait until it is let go."""
        self.someone_waits.unlink(missing_ok=True)
        (self.folder / "hold").touch()

    def slow(self, seconds: float) -> None:
        """Has everything take so long."""
        (self.folder / "slow").write_text(str(seconds))

    def mend(self, *troubles: str) -> None:
        for trouble in troubles:
            (self.folder / trouble).unlink(missing_ok=True)

    @property
    def someone_waits(self) -> Path:
        """Is there once somebody waits."""
        return self.folder / "waits"


class _Trouble:
    """The process's side."""

    def __init__(self, bad: BadStore) -> None:
        self._store = f"{bad.store}/"
        self._full, self._slow, self._hold, self._waits = (
            bad.folder / name for name in ("full", "slow", "hold", "waits")
        )
        self._left: int | None = None  # None: there is room

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Before anything that is done to files."""
        if event != "open" and event not in _NEEDS_ROOM and event not in _OTHERS:
            return
        path = arguments[1] if event == "os.link" else arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self._store):
            return
        while self._hold.exists():
            self._waits.touch()
            time.sleep(LOOK_S)  # nothing tells of a file's end
        time.sleep(float(_said(self._slow) or 0))
        if event in _NEEDS_ROOM or (event == "open" and (arguments[2] or 0) & _CREATES):
            self._take_room()

    def _take_room(self) -> None:
        if not (said := _said(self._full)):
            self._left = None
            return
        if self._left is None:
            self._left = int(said)
        self._left -= 1
        if self._left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _said(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def install(store: str = "") -> None:
    """For good, and for a child that calls it too: there is no way to remove it. An engine on
    another node is not a child, and has no store.
    """
    if not (store := store or os.environ.get(_VARIABLE, "")):
        return
    os.environ[_VARIABLE] = store
    sys.addaudithook(_Trouble(BadStore(Path(store))).look)

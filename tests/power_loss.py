"""What a disk holds when the power goes. A folder is filmed while something is done in it, and then
rebuilt as of any moment, as badly as a disk may have it.

What is sure is what was there before, a file's content since its fsync, and the names in a folder
since the folder's. Of all else each rebuilt folder has lost, torn or kept some: a disk need not
keep to the order in which things were done.
"""

import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Names = dict[str, int]  # of a folder: the inodes
SEEDS = 4  # of folders in which each name and each file was drawn by itself
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killed(BaseException):
    """The process that did it is no more."""


@dataclass(frozen=True)
class Disk:
    """Folders and files by their inodes."""

    folders: dict[int, Names]
    files: dict[int, bytes]


@dataclass(frozen=True)
class Moment:
    """Before an operation, or at the end."""

    before: str
    root: int
    live: Disk  # as processes see it
    sure: Disk

    def rebuilt(self, parent: Path) -> Iterator[tuple[str, Path]]:
        """New folders, each with a name for what is bad about it."""
        drawn = [random.Random(seed) for seed in range(SEEDS)]
        fates: list[tuple[str, Any, Any]] = [
            ("nothing that is not sure", lambda: False, lambda: "old"),
            ("names without content", lambda: True, lambda: "old"),
            ("names with zeros", lambda: True, lambda: "zeros"),
            ("names with half of the content", lambda: True, lambda: "half"),
            ("everything", lambda: True, lambda: "new"),
        ]
        for seed, draw in enumerate(drawn):
            any_name, any_content = _drawn_fates(draw)
            fates.append((f"drawn from seed {seed}", any_name, any_content))
        for count, (what, named, content) in enumerate(fates):
            folder = parent / str(count)
            self._rebuild(self.root, folder, named, content)
            yield f"power lost before {self.before}, {what}", folder

    def _rebuild(self, inode: int, folder: Path, named: Any, content: Any) -> None:
        folder.mkdir(parents=True)
        sure, live = self.sure.folders.get(inode, {}), self.live.folders.get(inode, {})
        for name in sorted(sure | live):
            old, new = sure.get(name), live.get(name)
            entry = new if old != new and named() else old
            if entry is None:
                continue
            if entry in self.sure.folders or entry in self.live.folders:
                self._rebuild(entry, folder / name, named, content)
            else:
                (folder / name).write_bytes(self._content(entry, content))

    def _content(self, inode: int, fate: Any) -> bytes:
        old = self.sure.files.get(inode, b"")
        new = self.live.files.get(inode, old)
        if old == new:
            return old
        half = new[: len(new) // 2]
        return {"old": old, "new": new, "half": half, "zeros": bytes(len(new))}[fate()]


def _drawn_fates(draw: random.Random) -> tuple[Any, Any]:
    return (
        lambda: draw.random() < 0.5,
        lambda: draw.choice(["old", "new", "new", "half", "zeros"]),
    )


class Film:
    """Of a folder, as this thread changes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moments: list[Moment] = []
        self.operations = 0
        self.kill_before: int | None = None  # the number of an operation, from 0
        self._thread = threading.get_ident()
        self._held: list[int] = []  # descriptors, so that no inode is used a second time
        self._looking = False
        self._sure = self._look()
        for path in [root, *root.rglob("*")]:
            self._hold(path)

    def note(self, operation: str) -> None:
        """Films the folder as it is before an operation."""
        if self._looking or threading.get_ident() != self._thread:
            return
        if self.kill_before is not None and self.operations >= self.kill_before:
            raise Killed
        self.operations += 1
        live = self._look()
        sure = Disk(dict(self._sure.folders), dict(self._sure.files))
        self.moments.append(Moment(operation, self.root.stat().st_ino, live, sure))

    def fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.note(f"fsync {path.name}")
        inode = os.fstat(descriptor).st_ino
        self._hold(path)
        if path.is_dir():
            for entry in path.iterdir():
                self._hold(entry)
            self._sure.folders[inode] = _names(path)
        else:
            self._sure.files[inode] = self._read(path)

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _hold(self, path: Path) -> None:
        self._looking = True
        self._held.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        self._looking = False

    def _read(self, path: Path) -> bytes:
        self._looking = True
        try:
            return path.read_bytes()
        finally:
            self._looking = False

    def _look(self) -> Disk:
        paths = [self.root, *self.root.rglob("*")]
        folders = {path.stat().st_ino: _names(path) for path in paths if path.is_dir()}
        files = {path.stat().st_ino: self._read(path) for path in paths if path.is_file()}
        return Disk(folders, files)


def _names(folder: Path) -> Names:
    return {entry.name: entry.stat().st_ino for entry in folder.iterdir()}


_running: list[Film] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _running:
        return
    if event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITES):
        _running[-1].note(f"{event} {Path(os.fsdecode(arguments[0])).name}")


sys.addaudithook(_watch)  # for good: there is no way to remove it


@contextmanager
def filmed(root: Path, *, kill_before: int | None = None) -> Iterator[Film]:
    """Films what is done in a folder. With `kill_before` all ends at an operation, as by SIGKILL,
    and what was done until then is in the folder, sure or not; `film.kill_before = None` lets
    another process go on.
    """
    film = Film(root)
    film.kill_before = kill_before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", film.fsync)
        patch.setattr(os, "fdatasync", film.fsync)
        _running.append(film)
        try:
            yield film
            film.kill_before = None
            film.note("nothing more")
        finally:
            _running.remove(film)
            film.close()

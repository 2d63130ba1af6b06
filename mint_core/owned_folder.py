"""Folders that belong to one process: locked while it lives, and removed by the next one when it is
gone, however it ended.
"""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mint_core.errors import FailedPrecondition

ROW_PREFIXES = TRAINER_ROWS, SAMPLER_ROWS = "engine-", "sampler-"


class OwnedFolder:
    """A new folder in `parent`, and the end of those whose owners are gone. Raises OSError."""

    def __init__(
        self, parent: Path, prefix: str, *, rescue: Callable[[Path, Path], None] = lambda *_: None
    ) -> None:
        """`rescue` may take files out of an abandoned folder into this one before it is removed."""
        looking = _lock(parent, wait=True)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self.path.chmod(0o700)  # whatever the umask
            self._lock = _lock(self.path)
            for folder in _abandoned(parent, prefix):
                rescue(folder, self.path)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(looking)

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Leaves the folder to the next process that looks."""
        os.close(self._lock)


def temporary_folder(prefix: str) -> OwnedFolder:
    """One among the system's temporary files, which no other user can enter. Raises OSError."""
    parent = Path(tempfile.gettempdir(), f"mint-{os.geteuid()}")
    parent.mkdir(mode=0o700, exist_ok=True)
    found = parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "others than this user can enter it", str(parent))
    return OwnedFolder(parent, prefix)


def owned_row_folder(parent: Path, prefix: str) -> OwnedFolder:
    """One for rows, in the folder that the option `row_folder` names. Raises FailedPrecondition."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return OwnedFolder(parent, prefix)
    except OSError as error:
        raise FailedPrecondition(
            f"`row_folder` {parent} cannot be used: {error.strerror}; choose another"
        ) from error


def remove_abandoned_rows(parent: Path) -> None:
    """Makes room on a disk that is full of rows whose owners are gone."""
    for prefix in ROW_PREFIXES:
        for folder in _abandoned(parent, prefix):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(parent: Path, prefix: str) -> Iterator[Path]:
    """The folders whose owners are gone, each locked while it is dealt with."""
    for folder in parent.glob(f"{prefix}*"):
        try:
            descriptor = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # its owner lives, or has just removed it
        try:
            yield folder
        finally:
            os.close(descriptor)


def _lock(folder: Path, *, wait: bool = False) -> int:
    """Locks a folder until the descriptor is closed, at the latest by the end of the process.
    Raises BlockingIOError if another holds it, unless it is to wait.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor

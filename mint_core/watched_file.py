"""A file that an operator edits while the service runs."""

import errno
from pathlib import Path


def read_file(path: Path) -> bytes:
    """What a file holds. Raises OSError, also for what is no file, such as a pipe, which would be
    waited for.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    return path.read_bytes()


class WatchedFile:
    """Says when it is to be read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = self._look()

    def changed(self) -> bool:
        """Whether it is another than at the last look."""
        before, self._version = self._version, self._look()
        return self._version != before

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

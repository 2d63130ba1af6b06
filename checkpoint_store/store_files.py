"""The one way in which files of the store are opened. Others may have put there what hangs whoever
opens it, or what leads out of the store.
"""

import errno
import io
import os
import stat
from pathlib import Path

MOST_TEXT_BYTES = 4 * 2**20  # of what is read whole: manifests, and smaller things


def open_file(path: Path) -> io.BufferedReader:
    """Opens a file to read it. Raises OSError, also over links, pipes, sockets and devices."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is no regular file", str(path))


def read_file(path: Path) -> bytes:
    """All of a small file. Raises OSError, also over a large one."""
    with open_file(path) as opened:
        check_small(os.fstat(opened.fileno()).st_size)
        return opened.read(MOST_TEXT_BYTES)


def problem_of(error: OSError) -> str:
    """What is wrong with a file that cannot be read. Raises MemoryError where nothing is: this
    process lacks memory or descriptors.
    """
    if error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        raise MemoryError(f"{error.filename or 'a file'}: {error.strerror}") from error
    return f"cannot be read: {error.strerror}"


def check_small(size_bytes: int) -> None:
    """Refuses what is not read whole. Raises OSError."""
    if size_bytes > MOST_TEXT_BYTES:
        raise OSError(errno.EFBIG, f"is larger than {MOST_TEXT_BYTES} bytes")

"""Checkpoints into folders: file by file, resumed, verified, and there only when all is."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mint._files.progress import Progress, reporting
from mint._transport.call import Call
from mint._transport.connection import Connection
from mint._transport.stream import Stream
from mint.errors import APIResponseValidationError, APITimeoutError, InvalidInputError, refused
from mint.types._checks import text
from mint.types.checkpoints import Checkpoint, CheckpointFile
from mintrpc.v1 import checkpoint_pb2

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STORED_LIMIT_S = 60.0  # for a snapshot that is in the server's memory alone
_STORED_INTERVAL_S = 0.2


def download(connection: Connection, path: str, folder: Path, progress: Progress | bool) -> Path:
    """Brings a checkpoint's files into a new folder. What an attempt that failed has left beside it
    is gone on with.
    """
    _check_free(folder)
    checkpoint = _stored(connection, path)
    part = _part(folder, checkpoint)
    part.mkdir(parents=True, exist_ok=True)
    with _alone(part, folder):
        _check_free(folder)  # another may have brought it meanwhile
        _fetch(connection, checkpoint, part, progress)
        if folder.exists():
            folder.rmdir()  # it is empty
        part.rename(folder)
    return folder


def _fetch(
    connection: Connection, checkpoint: Checkpoint, part: Path, progress: Progress | bool
) -> None:
    total = sum(file.size_bytes for file in checkpoint.files)
    done = 0
    with reporting(progress, total, checkpoint.path) as report:
        for file in checkpoint.files:
            for position in _bring(connection, checkpoint.revision_path, file, part):
                report(done + position)
            done += file.size_bytes


def _bring(connection: Connection, path: str, file: CheckpointFile, folder: Path) -> Iterator[int]:
    """Brings one file; yields how many bytes are there, after each piece."""
    if not _FILE_NAME.fullmatch(file.name):
        raise APIResponseValidationError(f"the server names a file {file.name!r}")
    target = folder / file.name
    if target.exists() and target.stat().st_size > file.size_bytes:
        target.unlink()
    with target.open("a+b") as opened:
        opened.seek(0)
        digest = hashlib.file_digest(opened, "sha256")  # of what an earlier attempt has brought
        yield opened.tell()
        with _FilePieces(connection, path, file, opened.tell()) as pieces:
            for data in pieces:
                opened.write(data)
                digest.update(data)
                yield opened.tell()
    if digest.hexdigest() != file.sha256:
        target.unlink()
        raise APIResponseValidationError(
            f"`{file.name}` of `{path}` arrived damaged; download it again"
        )


class _FilePieces(Stream[bytes]):
    """A file's bytes from a position on; a broken stream goes on where it was."""

    def __init__(
        self, connection: Connection, path: str, file: CheckpointFile, position: int
    ) -> None:
        self._file = file
        self._position = position
        self._request = checkpoint_pb2.DownloadCheckpointRequest(
            path=path, file_name=file.name, offset_bytes=position
        )
        super().__init__(connection, connection.checkpoints.DownloadCheckpoint, self._request)

    def _read(self, message: Any) -> bytes | None:
        if message.offset_bytes != self._position or message.file.sha256 != self._file.sha256:
            raise APIResponseValidationError(
                f"the server sent another piece of `{self._file.name}` than was asked for"
            )
        data: bytes = message.data
        self._position += len(data)
        return data or None

    def _opening_again(self) -> None:
        self._request.offset_bytes = self._position

    def _at_end(self) -> None:
        if self._position != self._file.size_bytes:
            raise APIResponseValidationError(
                f"the server ended `{self._file.name}` after {self._position} of "
                f"{self._file.size_bytes} bytes"
            )


def get_checkpoint(connection: Connection, path: str) -> Call[Checkpoint]:
    request = checkpoint_pb2.GetCheckpointRequest(path=text(path, "path"))
    return Call(connection, connection.checkpoints.GetCheckpoint, request, checkpoint_of)


def checkpoint_of(answer: Any) -> Checkpoint:
    """What an answer says of a checkpoint."""
    return Checkpoint.from_proto(answer.checkpoint)


def _check_free(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise refused(
            "folder",
            f"{str(folder)!r} exists and is not an empty folder; choose another, or "
            "remove it first",
        )


@contextmanager
def _alone(part: Path, folder: Path) -> Iterator[None]:
    """Keeps other downloads, of any process, from writing to the same files."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InvalidInputError(
            f"another download into `folder` {str(folder)!r} is under way; wait for it, or choose "
            "another folder",
            field="folder",
        ) from None
    finally:
        os.close(descriptor)


def _part(folder: Path, checkpoint: Checkpoint) -> Path:
    """Where the files lie until all are there. Another revision has another one."""
    digest = hashlib.sha256(checkpoint.revision_path.encode()).hexdigest()
    return folder.parent / f".{folder.name}.{digest[:12]}.part"


def _stored(connection: Connection, path: str) -> Checkpoint:
    """The revision that a path means now, with its files."""
    ends_s = time.monotonic() + _STORED_LIMIT_S
    while True:
        checkpoint = get_checkpoint(connection, path).ask()
        if checkpoint.files:
            return checkpoint
        if time.monotonic() > ends_s:
            raise APITimeoutError(
                f"snapshot `{path}` has not been stored within {_STORED_LIMIT_S:.0f} s; the "
                "`state_message` of its run says why"
            )
        path = checkpoint.revision_path
        time.sleep(_STORED_INTERVAL_S)

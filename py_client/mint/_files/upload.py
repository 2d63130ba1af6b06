"""A PEFT folder to a server: announced with its digests, sent in pieces, again if need be."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mint._files.download import checkpoint_of
from mint._files.progress import Progress, Report, reporting
from mint._transport.call import Call
from mint._transport.connection import Connection
from mint._transport.features import check_offered
from mint.errors import InvalidInputError, refused
from mint.types.checkpoints import Checkpoint
from mintrpc.v1 import checkpoint_pb2

Parts = Iterator[checkpoint_pb2.UploadCheckpointRequest]
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_PICKLED_FILE = "adapter_model.bin"
_PIECE_BYTES = 1024 * 1024


def upload(
    connection: Connection,
    folder: Path,
    header: checkpoint_pb2.UploadHeader,
    progress: Progress | bool,
) -> Checkpoint:
    """Sends the files and waits for what the server makes of them."""
    check_offered(connection, header)
    total = sum(file.size_bytes for file in header.files)
    with reporting(progress, total, header.name) as report:
        parts = partial(_parts_of, folder, header, report)
        return _UploadCall(connection, parts).submit().result()


class _UploadCall(Call[Checkpoint]):
    """One upload: every attempt sends all of it under the same id."""

    def __init__(self, connection: Connection, parts: Callable[[], Parts]) -> None:
        method = connection.checkpoints.UploadCheckpoint
        super().__init__(connection, method, None, checkpoint_of, attaches=False)
        self._parts = parts

    def name(self) -> str:
        return "UploadCheckpoint"

    def before_attempt(self) -> None:
        self.request = self._parts()


def _parts_of(folder: Path, header: checkpoint_pb2.UploadHeader, report: Report) -> Parts:
    yield checkpoint_pb2.UploadCheckpointRequest(header=header)
    done = 0
    for file in header.files:
        with (folder / file.name).open("rb") as opened:
            while data := opened.read(_PIECE_BYTES):
                offset = opened.tell() - len(data)
                piece = {"file_name": file.name, "offset_bytes": offset, "data": data}
                yield checkpoint_pb2.UploadCheckpointRequest(piece=piece)
                report(done + opened.tell())
            done += opened.tell()


def described(folder: Path, with_optimizer: bool) -> list[checkpoint_pb2.CheckpointFile]:
    """The files to send. Refuses a folder that lacks them."""
    names = [CONFIG_FILE, WEIGHTS_FILE, *([OPTIMIZER_FILE] if with_optimizer else [])]
    return [_described(folder, name) for name in names]


def _described(folder: Path, name: str) -> checkpoint_pb2.CheckpointFile:
    if not (folder / name).is_file():
        raise _missing(folder, name)
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return checkpoint_pb2.CheckpointFile(name=name, size_bytes=file.tell(), sha256=digest)


def _missing(folder: Path, name: str) -> InvalidInputError:
    remedy = "give the folder that PEFT's save_pretrained, or a download, has made"
    if name == WEIGHTS_FILE and (folder / _PICKLED_FILE).exists():
        remedy = (
            f"`{_PICKLED_FILE}` is a pickle, which could run code on the server: save the adapter "
            "with safetensors"
        )
    return refused("folder", f"{str(folder)!r} has no `{name}`; {remedy}")

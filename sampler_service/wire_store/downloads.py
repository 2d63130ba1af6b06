"""Files of checkpoints from a trainer. What was cut off goes on where it was, after a restart too:
its beginning lies beside the place of the file, under a name that has the digest of the whole.
"""

import fcntl
import hashlib
import io
import logging
import os
import time
from pathlib import Path

from checkpoint_store.adapter_files import verify_file
from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.manifest import FileEntry
from mintrpc.v1 import checkpoint_pb2
from sampler_service.wire_store.errors import StoreUnreachable
from sampler_service.wire_store.trainer import Trainer

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0  # with a trainer that sends nothing
_PAUSE_S = 0.1  # between two attempts


class TrainerFiles:
    """Those of one tenant. Blocking calls, safe from several threads and processes."""

    def __init__(self, trainer: Trainer, tenant: str) -> None:
        self._trainer = trainer
        self._tenant = tenant

    def fetch(self, path: str, file: Path, entry: FileEntry) -> None:
        """As of a Source. Raises StoreUnreachable, and whatever the trainer says."""
        part = file.with_name(f".{file.name}.{entry.sha256[:16]}.part")
        with part.open("a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)  # another process of this folder may be at it
            if not _is(part, opened):
                return verify_file(path, file, entry)  # and has brought it
            held_bytes = opened.seek(0, os.SEEK_END)
            if not self._receive(path, file.name, entry, opened) and not (
                # What lay here may have been damaged here.
                held_bytes and self._receive(path, file.name, entry, opened)
            ):
                raise CheckpointDamaged(path, file.name, "arrived with another SHA-256 than it has")
            part.rename(file)
        return None

    def _receive(self, path: str, name: str, entry: FileEntry, opened: io.BufferedRandom) -> bool:
        """Brings what is missing. Returns whether it is what was published; else it is gone."""
        opened.seek(0)
        digest = hashlib.file_digest(opened, "sha256")
        if (position := opened.tell()) > entry.size_bytes:
            opened.truncate(0)
            return self._receive(path, name, entry, opened)
        request = checkpoint_pb2.DownloadCheckpointRequest(
            path=path, for_tenant=self._tenant, file_name=name, offset_bytes=position
        )
        moved_s = time.monotonic()
        while request.offset_bytes < entry.size_bytes:
            if request.offset_bytes:
                logger.info("download goes on path=%s at=%d", path, request.offset_bytes)
            try:
                for piece in self._trainer.pieces(request):
                    _check(path, piece, entry, request.offset_bytes)
                    opened.write(piece.data)
                    digest.update(piece.data)
                    request.offset_bytes += len(piece.data)
                    moved_s = time.monotonic()
                break
            except StoreUnreachable:
                if self._trainer.closed or time.monotonic() - moved_s > PATIENCE_S:
                    raise
                time.sleep(_PAUSE_S)
        opened.flush()
        if digest.hexdigest() == entry.sha256:
            return True
        opened.truncate(0)
        return False


def _is(path: Path, opened: io.BufferedRandom) -> bool:
    """Whether a file is still in that place."""
    try:
        return os.path.samestat(path.stat(), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False


def _check(
    path: str,
    piece: checkpoint_pb2.DownloadCheckpointResponse,
    entry: FileEntry,
    position: int,
) -> None:
    """Refuses bytes that are not the next ones of the same file."""
    rest_bytes = entry.size_bytes - position
    same = piece.file.sha256 == entry.sha256 and piece.offset_bytes == position
    if not same or len(piece.data) > rest_bytes:
        raise CheckpointDamaged(path, piece.file.name, "is another than when it was looked up")

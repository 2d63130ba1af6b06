"""Files on their way between a front's disk and an engine's."""

import asyncio
import hashlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from mint_core.durable_files import flush_folder
from mint_core.engine_host.on_ray.frames import PIECE_BYTES, Kind, Link


async def send_file(link: Link, file: Path, path: str) -> int:
    """Sends a file under a name, piece by piece, others' frames between, and returns its size.
    Raises OSError before anything is sent, or PeerGone.
    """
    with await asyncio.to_thread(file.open, "rb") as opened:
        await link.tell(Kind.FILE, [path, os.fstat(opened.fileno()).st_mode & 0o777])
        digest, size_bytes = hashlib.sha256(), 0
        while piece := await asyncio.to_thread(_read, opened, digest):
            size_bytes += len(piece)
            async with link.turn:
                await link.put(Kind.FILE_PIECE, piece)
    async with link.turn:
        await link.put(Kind.FILE_END, digest.digest())
    return size_bytes


def _read(opened: BinaryIO, digest: "hashlib._Hash") -> bytes:
    try:
        piece = opened.read(PIECE_BYTES)
    except OSError:  # a disk's fault: what reads the rest finds it torn
        return b""
    digest.update(piece)
    return piece


class Arrival:
    """A file that comes: under its name when it is whole, and on disk. Blocks; raises OSError."""

    def __init__(self, file: Path, mode: int) -> None:
        self._file = file
        # Of its own: the same file may come twice at once, for two jobs.
        self._draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}.carried")
        self._digest = hashlib.sha256()
        descriptor = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        self._opened = os.fdopen(descriptor, "wb")

    def add(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._opened.write(piece)

    def finish(self, digest: bytes) -> None:
        """Shows it under its name."""
        with self._opened as opened:
            opened.flush()
            os.fsync(opened.fileno())
        if self._digest.digest() != digest:
            self.abandon()
            raise OSError(5, "a file has changed on its way", str(self._file))
        self._draft.rename(self._file)
        flush_folder(self._file.parent)

    def abandon(self) -> None:
        self._opened.close()
        self._draft.unlink(missing_ok=True)

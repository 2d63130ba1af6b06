"""An adapter in a file as it lies in a bank's memory, so that reading it is mapping it.

    numbers, float32 little-endian | layout, JSON | manifest, JSON | trailer

The trailer has the sizes of the other parts and a SHA-256 of all but the numbers. The numbers come
first, at the start of a page, and can be written by one process and described by another. A file
is complete before it gets the name under which it is looked for.
"""

import hashlib
import mmap
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.manifest import Manifest, decode_manifest, encode_manifest
from mint_core.lora.row_layout import RowLayout

Floats = NDArray[np.float32]

MAGIC = b"MINTROW1"  # with the version of this format
_TRAILER = struct.Struct("<QQQ32s8s")  # sizes in bytes of numbers, layout, manifest; SHA-256; MAGIC
_SIZES = struct.Struct("<QQQ")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A file that is there, whole, and the adapter that was asked for."""

    path: Path
    manifest: Manifest
    layout: RowLayout
    size_bytes: int  # of the file
    _numbers_bytes: int = field(repr=False)

    def numbers(self) -> Floats:
        """The row [params], in the pages of the file; writing to it changes a copy."""
        return map_numbers(self.path, self._numbers_bytes)

    def weights(self) -> dict[str, Floats]:
        """A and B by PEFT's names, as views of the file."""
        return self.layout.matrices(self.numbers(), self.manifest.spec)


def map_numbers(file: Path, size_bytes: int) -> Floats:
    """The first bytes of a file, mapped. They stay readable when the file is removed."""
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), size_bytes, access=mmap.ACCESS_COPY)
    return np.frombuffer(pages, "<f4")


def describe_row(file: Path, manifest: Manifest, layout: RowLayout) -> None:
    """Makes a row file of one that holds the numbers alone."""
    numbers_bytes = file.stat().st_size
    assert numbers_bytes == 4 * layout.size, "the numbers of another layout"
    encoded = encode_manifest(manifest)
    sizes = _SIZES.pack(numbers_bytes, len(layout.encoded), len(encoded))
    digest = hashlib.sha256(sizes + layout.encoded + encoded).digest()
    with file.open("ab") as opened:
        opened.write(layout.encoded + encoded + sizes + digest + MAGIC)


def open_row(file: Path, revision_path: str) -> PublishedRow:
    """Opens the file of a revision. Raises FileNotFoundError, or CheckpointDamaged if the file is
    anything else than that whole row.
    """
    with file.open("rb") as opened:
        size_bytes = os.fstat(opened.fileno()).st_size
        tail = os.pread(opened.fileno(), _TRAILER.size, max(0, size_bytes - _TRAILER.size))
        if len(tail) < _TRAILER.size or not tail.endswith(MAGIC):
            raise _damaged(file, revision_path, f"does not end in {MAGIC.decode()}")
        numbers, layout, manifest, digest, _ = _TRAILER.unpack(tail)
        described = numbers + layout + manifest + _TRAILER.size
        if described != size_bytes:
            problem = f"has {size_bytes} bytes where its trailer says {described}"
            raise _damaged(file, revision_path, problem)
        head = os.pread(opened.fileno(), layout + manifest, numbers)
    if hashlib.sha256(tail[: _SIZES.size] + head).digest() != digest:
        raise _damaged(file, revision_path, "has another header than was written")
    try:
        described_by = decode_manifest(head[layout:])
    except ValueError as error:
        raise _damaged(file, revision_path, f"has a manifest that {error}") from None
    if str(described_by.revision_path) != revision_path:
        raise _damaged(file, revision_path, f"is that of `{described_by.revision_path}`")
    row_layout = RowLayout(head[:layout])
    return PublishedRow(file, described_by, row_layout, size_bytes, numbers)


def _damaged(file: Path, revision_path: str, problem: str) -> CheckpointDamaged:
    return CheckpointDamaged(revision_path, file.name, problem)

"""A row in a file: its vectors as they lie in memory, in safetensors' format, named by part.

The header tells what the row is, the digest of each vector and its own. No torch here, so that a
state folder can be read without it.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mint_core.durable_files import flush_folder
from mint_core.errors import MintError, ResourceExhausted
from mint_core.fault_points import fault_point
from mint_core.lora.row_digest import digest

FORMAT = "mint-row-1"
RETRY_S = 1.0  # after a full disk
_OWN_DIGEST = "header_digest"  # files of older versions lack it
_CHUNK_BYTES = 32 * 1024 * 1024  # written and flushed at a time


class SnapshotDamaged(MintError):
    """The file is not what was written."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"snapshot {path.name} {problem}", file=path.name)


class SnapshotFailed(ResourceExhausted):
    """The disk did not take it; the one before it is as good as ever."""

    reason = "SNAPSHOT_FAILED"

    def __init__(self, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        super().__init__(
            f"a row could not be written: {error.strerror}",
            retry_after_s=RETRY_S if full else None,
        )


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its vectors."""

    about: Mapping[str, str]
    digests: Mapping[str, int]  # by part
    length: int  # of each vector, in floats
    start: int  # of the first, in bytes


def write(
    path: Path,
    parts: Mapping[str, NDArray[np.float32]],  # each [params], contiguous
    digests: Mapping[str, int],
    about: Mapping[str, str],
    progress: Callable[[], None] = lambda: None,  # called now and then
) -> int:
    """Writes a file that appears under its name when it is whole and on disk. Returns its size.
    Raises SnapshotFailed.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(_encode_header(parts, digests, about))
            for vector in parts.values():
                _write_durably(file, vector, progress)
            size_bytes = file.tell()
        fault_point("snapshot:before-rename")
        draft.rename(path)
        fault_point("snapshot:after-rename")
        flush_folder(path.parent)
    except OSError as error:
        raise SnapshotFailed(error) from error
    finally:
        draft.unlink(missing_ok=True)
    return size_bytes


def read_header(path: Path) -> Header:
    """Raises SnapshotDamaged, also for a file that is shorter or longer than it should be."""
    try:
        with path.open("rb") as file:
            return _read_header(path, file)
    except OSError as error:
        raise SnapshotDamaged(path, f"cannot be read: {error.strerror}") from error


def read(path: Path, header: Header) -> dict[str, NDArray[np.float32]]:
    """The vectors by part, not checked against their digests. Raises SnapshotDamaged."""
    vectors = {}
    try:
        with path.open("rb") as file:
            file.seek(header.start)
            for part in header.digests:
                vectors[part] = np.fromfile(file, "<f4", header.length)
    except OSError as error:
        raise SnapshotDamaged(path, f"cannot be read: {error.strerror}") from error
    if any(len(vector) != header.length for vector in vectors.values()):
        raise SnapshotDamaged(path, "is shorter than it was written")
    return vectors


def damaged_parts(path: Path, header: Header) -> list[str]:
    """The vectors of a row's file that are not what was written."""
    vectors = read(path, header).items()
    return [part for part, vector in vectors if digest(vector) != header.digests[part]]


def _encode_header(
    parts: Mapping[str, NDArray[np.float32]],
    digests: Mapping[str, int],
    about: Mapping[str, str],
) -> bytes:
    known = {f"digest.{part}": f"{digests[part]:016x}" for part in parts}
    metadata = {"format": FORMAT, **about, **known}
    content: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for part, vector in parts.items():
        start, end = end, end + vector.nbytes
        content[part] = {"dtype": "F32", "shape": [len(vector)], "data_offsets": [start, end]}
    metadata[_OWN_DIGEST] = _digest(content)
    encoded = json.dumps(content).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the vectors are aligned
    return len(encoded).to_bytes(8, "little") + encoded


def _write_durably(
    file: BinaryIO, vector: NDArray[np.float32], progress: Callable[[], None]
) -> None:
    content = vector.data.cast("B")
    for start in range(0, len(content), _CHUNK_BYTES):
        file.write(content[start : start + _CHUNK_BYTES])
        file.flush()
        os.fdatasync(file.fileno())
        progress()


def _read_header(path: Path, file: BinaryIO) -> Header:
    size_bytes = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        content: dict[str, Any] = json.loads(file.read(min(length, size_bytes)))
        own_digest = content["__metadata__"].pop(_OWN_DIGEST, None)
        if own_digest not in (None, _digest(content)):
            raise SnapshotDamaged(path, "has a header that does not match its own digest")
        about = content.pop("__metadata__")
        digests = {part: int(about.pop(f"digest.{part}"), 16) for part in content}
        ((floats,),) = {tuple(entry["shape"]) for entry in content.values()}
        found_format = about["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SnapshotDamaged(path, "is torn or no snapshot") from None
    if found_format != FORMAT:
        raise SnapshotDamaged(path, f"has format {found_format}, and {FORMAT} is read here")
    if size_bytes != 8 + length + 4 * floats * len(digests):
        raise SnapshotDamaged(path, f"has {size_bytes} bytes, not those it was written with")
    return Header(about, digests, floats, 8 + length)


def _digest(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

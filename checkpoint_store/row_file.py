"""A row in a file: its vectors as they lie in memory, in safetensors' format, named by part.

    length of the header, 8 bytes | header, JSON, and spaces | weights | the other parts

The header tells what the row is, the digest of each part and its own. The numbers begin at a page,
weights first, so that to read them can be to map them; in files of older versions they begin
anywhere. What is read is checked against its digest; what is mapped is as it lies until somebody
checks it, since that takes longer than mapping: 8 ms for 45 MB, where a sampler that maps a row of
its trainer's waits for 3 (2026-11-29). No torch here: fronts, the state tool and samplers read rows
without it.
"""

import io
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_store.manifest import digest_of
from checkpoint_store.store_files import open_file, problem_of
from mint_core.durable_files import flush_folder
from mint_core.errors import MintError
from mint_core.fault_points import fault_point
from mint_core.lora.row_digest import digest
from mint_core.lora.row_layout import Floats

FORMAT = "mint-row-1"
WEIGHTS = "weights"  # the part that every row has
CHUNK_BYTES = 32 * 1024 * 1024  # written, and flushed if need be, at a time
_PAGE_BYTES = 4096
_OWN_DIGEST = "header_digest"  # the oldest files lack it

Progress = Callable[[], None]  # called now and then: disks are slow


class RowDamaged(MintError):
    """The file is not what was written."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(f"row file {file.name} {problem}", file=file.name)
        self.problem = problem


class RowMissing(RowDamaged):
    """There is no such file."""


@dataclass(frozen=True, slots=True)
class RowFile:
    """A whole file, and what its header says."""

    path: Path
    about: Mapping[str, str]
    digests: Mapping[str, int]  # by part, in the order in which they lie
    length: int  # of each part, in numbers
    start: int  # of the first, in bytes

    @classmethod
    def open(cls, path: Path) -> "RowFile":
        """Raises RowDamaged, also if it is shorter or longer than it should be."""
        with _opened(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            encoded = file.read(length if length < size_bytes else 0)
        try:
            content: dict[str, Any] = json.loads(encoded)
            own_digest = content["__metadata__"].pop(_OWN_DIGEST, None)
            if own_digest not in (None, digest_of(content)):
                raise RowDamaged(path, "has a header that does not match its own digest")
            about = content.pop("__metadata__")
            digests = {part: int(about.pop(f"digest.{part}"), 16) for part in content}
            ((numbers,),) = {tuple(entry["shape"]) for entry in content.values()}
            found_format = about["format"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RowDamaged(path, f"is torn, or not of format {FORMAT}") from None
        if found_format != FORMAT:
            raise RowDamaged(path, f"has format {found_format}, and {FORMAT} is read here")
        row = cls(path, about, digests, numbers, 8 + length)
        if size_bytes != row.size_bytes:
            raise RowDamaged(path, f"has {size_bytes} bytes, not those it was written with")
        return row

    @property
    def size_bytes(self) -> int:
        return self.start + 4 * self.length * len(self.digests)

    def read(self, part: str, into: Floats | None = None) -> Floats:  # [params]
        """A part, in memory of its own or of the caller's. Raises RowDamaged."""
        vector = np.empty(self.length, "<f4") if into is None else into
        assert len(vector) == self.length, "room for another row"
        with _opened(self.path) as file:
            file.seek(self._place(part))
            size_bytes = file.readinto(vector.data.cast("B"))
        if size_bytes != vector.nbytes:
            raise RowDamaged(self.path, "is shorter than it was written")
        return self.check(part, vector)

    def map(self, part: str) -> Floats:  # [params]
        """A part, in the pages of the file; writing to it changes a copy. It stays readable when
        the file is removed. Not checked; raises RowDamaged where there is nothing to map.
        """
        with _opened(self.path) as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return np.frombuffer(pages, "<f4", self.length, self._place(part))

    def check(self, part: str, vector: Floats) -> Floats:
        """The vector, if it is as the part was written. Raises RowDamaged."""
        if digest(vector) != self.digests[part]:
            raise RowDamaged(self.path, f"has damaged {part}: its digest is another")
        return vector

    def _place(self, part: str) -> int:
        return self.start + 4 * self.length * list(self.digests).index(part)


def write_row(
    file: Path,
    parts: Mapping[str, Floats],  # each [params], contiguous
    about: Mapping[str, str],
    progress: Progress = lambda: None,
) -> int:
    """Writes to a file that is new, or was made as large or larger beforehand. It is whole when
    this returns, and perhaps not on disk. Returns its size. Raises OSError. A digest that `about`
    tells under its name in the header is believed: it need not be taken again.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)  # what was made is not given back
    with open(descriptor, "wb") as opened:
        opened.writelines(_pieces(parts, about, progress))
        return opened.truncate()


def save_row(
    file: Path,
    parts: Mapping[str, Floats],
    about: Mapping[str, str],
    progress: Progress = lambda: None,
) -> int:
    """The same for a file that appears under its name when it is whole and on disk."""
    draft = file.with_name(f".{file.name}.draft")
    try:
        with open(draft, "wb", opener=_private) as opened:
            for piece in _pieces(parts, about, progress):
                opened.write(piece)
                opened.flush()
                os.fdatasync(opened.fileno())
            size_bytes = opened.tell()
        fault_point("snapshot:before-rename")
        draft.rename(file)
        fault_point("snapshot:after-rename")
        flush_folder(file.parent)
    finally:
        draft.unlink(missing_ok=True)
    return size_bytes


def _pieces(
    parts: Mapping[str, Floats], about: Mapping[str, str], progress: Progress
) -> Iterator[bytes | memoryview]:
    """What is to be written, in order. Whoever asks for more has written what there was."""
    ordered = dict(sorted(parts.items(), key=lambda part: part[0] != WEIGHTS))
    yield _encode_header(ordered, about, progress)
    for vector in ordered.values():
        content = vector.data.cast("B")
        for start in range(0, len(content), CHUNK_BYTES):
            yield content[start : start + CHUNK_BYTES]
            progress()


def _encode_header(
    parts: Mapping[str, Floats], about: Mapping[str, str], progress: Progress
) -> bytes:
    metadata = {"format": FORMAT, **about}
    content: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for part, vector in parts.items():
        name = f"digest.{part}"
        metadata[name] = metadata.get(name) or f"{digest(vector):016x}"
        progress()
        start, end = end, end + vector.nbytes
        content[part] = {"dtype": "F32", "shape": [len(vector)], "data_offsets": [start, end]}
    metadata[_OWN_DIGEST] = digest_of(content)
    encoded = json.dumps(content).encode()
    encoded += b" " * (-(8 + len(encoded)) % _PAGE_BYTES)
    return len(encoded).to_bytes(8, "little") + encoded


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with open_file(path) as file:
            yield file
    except (FileNotFoundError, NotADirectoryError):
        raise RowMissing(path, "is not there") from None
    except OSError as error:
        raise RowDamaged(path, problem_of(error)) from error

"""Safetensors files of strangers. The header is checked whole before anything is read by it.

https://github.com/huggingface/safetensors#format: 8 bytes with the size of the header, the header
in JSON, then the tensors without holes or overlaps.
"""

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mint_core.errors import InvalidRequest

_SIZE_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # as the library has it
_MOST_DIMENSIONS = 8
_BFLOAT16 = "BF16"  # which numpy lacks
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", _BFLOAT16: "<u2"}
# How pickles begin: those of torch.save are zip archives, plain ones name their protocol.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    dtype: str  # as the format names it
    shape: tuple[int, ...]
    start: int  # in the file, in bytes
    stop: int


class TensorFile:
    """A file, mapped. Raises InvalidRequest over what is no such file; `name` is what the caller
    calls it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        with path.open("rb") as opened:
            size_bytes = path.stat().st_size
            if opened.read(max(map(len, _PICKLES))).startswith(_PICKLES):
                raise self.refused("is a pickle, which could run code; save safetensors instead")
            if size_bytes < _SIZE_BYTES:
                raise self.refused(f"has {size_bytes} bytes, too few for safetensors")
            self._pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: Mapping[str, str] = {}
        self.tensors = self._read_header(size_bytes)

    def float32(self, tensor: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """A tensor, or rows of it, converted. What exceeds float32 becomes infinite."""
        entry = self.tensors[tensor]
        if entry.dtype not in _FLOATS:
            raise self.refused(
                f"holds `{tensor}` as {entry.dtype}; tensors must be of {', '.join(_FLOATS)}",
                tensor=tensor,
            )
        count = math.prod(entry.shape)
        stored = np.frombuffer(self._pages, _FLOATS[entry.dtype], count, entry.start)
        stored = stored.reshape(entry.shape)[rows] if entry.shape else stored
        if entry.dtype == _BFLOAT16:  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            return stored.astype(np.float32)

    def refused(self, problem: str, **metadata: str) -> InvalidRequest:
        """What is wrong with the file."""
        return InvalidRequest(f"`{self._name}` {problem}", field=self._name, **metadata)

    def _read_header(self, size_bytes: int) -> Mapping[str, TensorEntry]:
        stop = _SIZE_BYTES + int.from_bytes(self._pages[:_SIZE_BYTES], "little")
        if stop > min(size_bytes, _MOST_HEADER_BYTES):
            raise self.refused("is no safetensors file: its header is longer than the file")
        try:
            content = json.loads(self._pages[_SIZE_BYTES:stop], object_pairs_hook=_once)
            metadata = content.pop("__metadata__", {})
            self.metadata = {str(key): str(value) for key, value in metadata.items()}
            entries = {name: _entry(value, stop) for name, value in content.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self.refused(
                f"is no safetensors file: its header is not legal ({error})"
            ) from None
        self._check_places(entries, stop, size_bytes)
        return entries

    def _check_places(
        self, entries: Mapping[str, TensorEntry], start: int, size_bytes: int
    ) -> None:
        """Refuses tensors that overlap, leave holes, or are not of their size."""
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != start or entry.stop > size_bytes:
                raise self.refused(
                    f"is torn: `{name}` lies from byte {entry.start} to {entry.stop} where {start} "
                    f"to at most {size_bytes} is free",
                    tensor=name,
                )
            if entry.dtype in _FLOATS:
                item_bytes = np.dtype(_FLOATS[entry.dtype]).itemsize
                if entry.stop - entry.start != item_bytes * math.prod(entry.shape):
                    raise self.refused(
                        f"is torn: `{name}` of shape {list(entry.shape)} and {entry.dtype} has "
                        f"{entry.stop - entry.start} bytes",
                        tensor=name,
                    )
            start = entry.stop
        if start != size_bytes:
            raise self.refused(f"is torn: it has {size_bytes - start} bytes behind its tensors")


def _entry(value: Any, data_start: int) -> TensorEntry:
    shape, (start, stop) = value["shape"], value["data_offsets"]
    numbers: Sequence[Any] = (*shape, start, stop)
    if any(type(number) is not int or number < 0 for number in numbers) or stop < start:
        raise ValueError("shapes and offsets must be whole numbers")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    return TensorEntry(str(value["dtype"]), tuple(shape), data_start + start, data_start + stop)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content

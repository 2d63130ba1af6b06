"""Safetensors files of strangers. The library checks the header whole before anything is read by
it: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mint_core.errors import InvalidRequest

_BFLOAT16 = "BF16"  # which numpy lacks, so that the library reads none into its arrays
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", _BFLOAT16: "<u2"}
# How pickles begin: those of torch.save are zip archives, plain ones name their protocol.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    dtype: str  # as the format names it
    shape: tuple[int, ...]
    start: int  # in the file, in bytes


class TensorFile:
    """A file, mapped. Raises InvalidRequest over what is no such file; `name` is what the caller
    calls it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        with path.open("rb") as opened:
            if opened.read(max(map(len, _PICKLES))).startswith(_PICKLES):
                raise self.refused("is a pickle, which could run code; save safetensors instead")
            try:
                with safe_open(path, "numpy") as checked:
                    self.metadata: Mapping[str, str] = checked.metadata() or {}
            except SafetensorError as error:
                problem = str(error).removeprefix("Error while deserializing header: ")
                raise self.refused(f"is no whole safetensors file: {problem}") from None
            self._pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        data_start = 8 + int.from_bytes(self._pages[:8], "little")
        header = json.loads(self._pages[8:data_start])
        header.pop("__metadata__", None)
        self.tensors: Mapping[str, TensorEntry] = {
            tensor: TensorEntry(
                entry["dtype"], tuple(entry["shape"]), data_start + entry["data_offsets"][0]
            )
            for tensor, entry in header.items()
        }

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

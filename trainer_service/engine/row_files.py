"""Rows in files, for runs that are idle and fit in no memory.

The files are of no use without the engine that wrote them: each engine has a folder of its own,
locked while it lives, and removes those whose engines are gone.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mint_core.errors import EngineFault, FailedPrecondition, ResourceExhausted
from mint_core.lora.bank import Part, zero_vector
from mint_core.owned_folder import OwnedFolder

logger = logging.getLogger(__name__)

_PREFIX = "engine-"


class RowStorageFull(ResourceExhausted):
    """There is no room for one more row, neither in memory nor on disk."""

    reason = "ROW_STORAGE_FULL"


class RowFiles:
    """One file per row: its parts, one after the other, as they lie in memory."""

    def __init__(self, parent: Path) -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._folder = OwnedFolder(parent, _PREFIX).path
        except OSError as error:
            raise FailedPrecondition(
                f"`row_folder` {parent} cannot be used: {error.strerror}; choose another"
            ) from error
        self._parts: dict[str, tuple[Part, ...]] = {}

    def __len__(self) -> int:
        """How many rows are here."""
        return len(self._parts)

    def put(self, name: str, parts: Mapping[Part, Tensor]) -> None:
        """Writes a row; raises RowStorageFull, and keeps nothing of it, if that fails."""
        path = self._path(name)
        try:
            with path.open("wb") as file:
                for vector in parts.values():
                    file.write(_bytes(vector.cpu()))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise RowStorageFull(
                f"memory for training runs is full, and an idle one cannot be moved to "
                f"`row_folder`: {error.strerror}; nothing of it is lost; free disk space or delete "
                "runs, and call again"
            ) from error
        self._parts[name] = tuple(parts)

    def get(self, name: str, size: int) -> dict[Part, Tensor]:
        """Reads a row of vectors [size], which stays here too."""
        parts = {part: zero_vector(size, torch.device("cpu")) for part in self._parts[name]}
        try:
            with self._path(name).open("rb", buffering=0) as file:
                for vector in parts.values():
                    _read_whole(file.fileno(), _bytes(vector))
        except OSError as error:
            logger.exception("a row could not be read")
            raise EngineFault(
                f"the weights of training run `{name}` cannot be read from `row_folder`: {error}",
                training_run_id=name,
            ) from error
        return parts

    def drop(self, name: str) -> None:
        """Removes a row, if it is here."""
        if self._parts.pop(name, None) is not None:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.row"


def _bytes(vector: Tensor) -> memoryview:
    return vector.numpy().data.cast("B")


def _read_whole(descriptor: int, buffer: memoryview) -> None:
    while buffer:
        count = os.readv(descriptor, [buffer])
        if not count:
            raise OSError("the file is shorter than it was written")
        buffer = buffer[count:]

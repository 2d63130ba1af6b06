"""Rows in files, for runs that are idle and fit in no memory.

The files are of no use without the engine that wrote them: each engine has a folder of its own,
locked while it lives, and removes those whose engines are gone.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_store.row_file import RowDamaged, RowFile, write_row
from mint_core.errors import EngineFault
from mint_core.lora.bank import Part, zero_vector
from mint_core.owned_folder import TRAINER_ROWS, owned_row_folder
from trainer_service.errors import RowStorageFull

logger = logging.getLogger(__name__)


class RowFiles:
    """One row file per row. It need not outlive the machine, so it is not flushed to disk."""

    def __init__(self, parent: Path, progress: Callable[[], None] = lambda: None) -> None:
        self._folder = owned_row_folder(parent, TRAINER_ROWS).path
        self._progress = progress
        self._names: set[str] = set()

    def __len__(self) -> int:
        """How many rows are here."""
        return len(self._names)

    def put(self, name: str, parts: Mapping[Part, Tensor]) -> None:
        """Writes a row; raises RowStorageFull, and keeps nothing of it, if that fails."""
        path = self._path(name)
        try:
            vectors = {part.value: vector.cpu().numpy() for part, vector in parts.items()}
            write_row(path, vectors, {}, self._progress)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise RowStorageFull(
                f"memory for training runs is full, and an idle one cannot be moved to "
                f"`row_folder`: {error.strerror}; nothing of it is lost; free disk space or delete "
                "runs, and call again"
            ) from error
        self._names.add(name)

    def get(self, name: str, size: int) -> dict[Part, Tensor]:
        """Reads a row of vectors [size], which stays here too."""
        parts = {}
        try:
            file = RowFile.open(self._path(name))
            for part in file.digests:
                vector = parts[Part(part)] = zero_vector(size, torch.device("cpu"))
                file.read(part, vector.numpy())
                self._progress()
        except RowDamaged as error:
            logger.exception("a row could not be read")
            raise EngineFault(
                f"the weights of training run `{name}` cannot be read from `row_folder`: {error}",
                training_run_id=name,
            ) from error
        return parts

    def drop(self, name: str) -> None:
        """Removes a row, if it is here."""
        self._names.discard(name)
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.row"

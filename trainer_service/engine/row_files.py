"""Parts of rows in files, for runs that are idle and fit in no memory.

The files are of no use without the engine that wrote them: each engine has a folder of its own,
locked while it lives, and removes those whose engines are gone.
"""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_store.row_file import RowDamaged, RowFile, write_row
from mint_core.errors import EngineFault
from mint_core.lora.bank import Part, zero_vector
from mint_core.owned_folder import TRAINER_ROWS, owned_row_folder
from trainer_service.errors import RowStorageFull

logger = logging.getLogger(__name__)


RowPart = tuple[str, Part]  # of a run


class RowFiles:
    """A row file per part. They need not outlive the machine, so they are not flushed to disk."""

    def __init__(self, parent: Path, progress: Callable[[], None] = lambda: None) -> None:
        self._folder = owned_row_folder(parent, TRAINER_ROWS).path
        self._progress = progress
        self._places: set[RowPart] = set()
        self.count = Counter[Part]()  # how many rows have a part here

    def __contains__(self, place: object) -> bool:
        return place in self._places

    def put(self, place: RowPart, vector: Tensor) -> None:
        """Writes a part; raises RowStorageFull, and keeps nothing of it, if that fails."""
        self.write(place, vector)
        self.note(place)

    def write(self, place: RowPart, vector: Tensor) -> None:
        """As `put`, in any thread. The part is not here before it is noted."""
        path = self._path(place)
        try:
            write_row(path, {place[1].value: vector.cpu().numpy()}, {}, self._progress)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise RowStorageFull(
                f"memory for training runs is full, and an idle one cannot be moved to "
                f"`row_folder`: {error.strerror}; nothing of it is lost; free disk space or delete "
                "runs, and call again"
            ) from error

    def note(self, place: RowPart) -> None:
        """Takes note of a part that was written."""
        self._places.add(place)
        self.count[place[1]] += 1

    def get(self, place: RowPart, size: int) -> Tensor:  # [size]
        """Reads a part, which stays here too. Any thread may."""
        name, part = place
        vector = zero_vector(size, torch.device("cpu"))
        try:
            RowFile.open(self._path(place)).read(part.value, vector.numpy())
            self._progress()
        except RowDamaged as error:
            logger.exception("a row could not be read")
            raise EngineFault(
                f"the {part} of training run `{name}` cannot be read from `row_folder`: {error}",
                training_run_id=name,
            ) from error
        return vector

    def drop(self, place: RowPart) -> None:
        """Removes a part, if it is here."""
        if place in self._places:
            self._places.remove(place)
            self.count[place[1]] -= 1
            self.unlink(place)

    def unlink(self, place: RowPart) -> None:
        """Removes the file of a part that is to be dropped. Any thread may."""
        self._path(place).unlink(missing_ok=True)

    def _path(self, place: RowPart) -> Path:
        return self._folder / f"{place[0]}.{place[1]}.row"

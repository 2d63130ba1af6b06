"""A checkpoint that is being read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from checkpoint_store.adapter_files import check_arrays, read_weights
from checkpoint_store.manifest import Manifest
from checkpoint_store.memory.published_row import PublishedRow
from checkpoint_store.places import Place
from checkpoint_store.revisions import renew_lease
from checkpoint_store.row_file import RowMissing
from mint_core.errors import CheckpointNotFound
from mint_core.lora.row_layout import Floats


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """A revision, whose files `CheckpointStore.open` has verified. Arrays have PEFT's names."""

    manifest: Manifest
    # Opens with `PeftModel.from_pretrained`. Absent while a snapshot is not stored; of an object
    # store's checkpoints it holds copies, for a while, once they are verified.
    folder: Path
    place: Place  # in the store
    row: PublishedRow | None = None  # the same weights in memory

    def note_use(self) -> None:
        """Keeps the revision for another while."""
        renew_lease(self.place)

    @property
    def copied(self) -> bool:
        """Whether the folder holds copies."""
        return self.folder != self.place

    def weights(self) -> dict[str, Floats]:
        with self.present():
            weights = self.row.weights() if self.row else read_weights(self.folder)
        check_arrays(str(self.manifest.revision_path), self.manifest.spec, weights)
        return weights

    @contextmanager
    def present(self) -> Iterator[None]:
        """Says CheckpointNotFound where a file is no longer there."""
        try:
            yield
        except (FileNotFoundError, RowMissing):  # deleted since it was opened
            raise CheckpointNotFound(str(self.manifest.revision_path)) from None

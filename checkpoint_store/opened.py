"""A checkpoint that is being read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from checkpoint_store.adapter_files import (
    OPTIMIZER_FILE,
    Floats,
    check_arrays,
    read_moments,
    read_weights,
)
from checkpoint_store.manifest import Manifest
from checkpoint_store.memory.published_row import PublishedRow
from checkpoint_store.places import Place
from checkpoint_store.revisions import renew_lease
from checkpoint_store.row_file import RowMissing
from mint_core.errors import CheckpointNotFound, FailedPrecondition
from mint_core.lora.spec import AdapterArrays


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """A revision, whose files `CheckpointStore.open` has verified. Arrays have PEFT's names."""

    manifest: Manifest
    # Opens with `PeftModel.from_pretrained`. Absent while a snapshot is not stored; of an object
    # store's checkpoints it holds copies, for a while, once they are verified.
    folder: Path
    place: Place  # in the store
    row: PublishedRow | None = None  # the same weights in memory

    @property
    def stored(self) -> bool:
        """Whether the files are there: a snapshot may be in memory alone."""
        return bool(self.manifest.files)

    def note_use(self) -> None:
        """Keeps the revision for another while."""
        renew_lease(self.place)

    @property
    def copied(self) -> bool:
        """Whether the folder holds copies."""
        return self.folder != self.place

    @property
    def has_optimizer(self) -> bool:
        return OPTIMIZER_FILE in self.manifest.files

    def weights(self) -> dict[str, Floats]:
        with self.present():
            weights = self.row.weights() if self.row else read_weights(self.folder)
        self._check(weights)
        return weights

    def exp_avg(self) -> dict[str, Floats]:
        return self._moments()[0]

    def exp_avg_sq(self) -> dict[str, Floats]:
        return self._moments()[1]

    def _moments(self) -> tuple[dict[str, Floats], dict[str, Floats]]:
        path = self.manifest.revision_path
        if not self.has_optimizer:
            raise FailedPrecondition(
                f"checkpoint `{path}` has no optimizer state; load it without, or use a "
                f"path of kind `weights`",
                path=path,
            )
        with self.present():
            moments = read_moments(self.folder)
        for arrays in moments:
            self._check(arrays)
        return moments

    def _check(self, arrays: AdapterArrays) -> None:
        check_arrays(str(self.manifest.revision_path), self.manifest.spec, arrays)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Says CheckpointNotFound where a file is no longer there."""
        try:
            yield
        except (FileNotFoundError, RowMissing):  # deleted since it was opened
            raise CheckpointNotFound(str(self.manifest.revision_path)) from None

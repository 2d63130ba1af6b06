"""The row file of a revision. Beside the numbers it holds the manifest, and the layout by which
they are read where rows lie otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.manifest import Manifest, decode_manifest, encode_manifest
from checkpoint_store.row_file import WEIGHTS, Progress, RowDamaged, RowFile, RowMissing, write_row
from mint_core.lora.row_layout import Floats, RowLayout


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A file that is there, whole, and the adapter that was asked for."""

    file: RowFile
    manifest: Manifest
    layout: RowLayout

    def numbers(self) -> Floats:  # [params]
        """The row, in the pages of the file, not checked; writing to it changes a copy. Raises
        RowMissing, CheckpointDamaged.
        """
        with _damage_of(str(self.manifest.revision_path)):
            return self.file.map(WEIGHTS)

    def weights(self) -> dict[str, Floats]:
        """A and B by PEFT's names, as views of the file, and as they were written. Raises as
        `numbers`.
        """
        with _damage_of(str(self.manifest.revision_path)):
            row = self.file.check(WEIGHTS, self.file.map(WEIGHTS))
        return self.layout.matrices(row, self.manifest.spec)


def write_published_row(
    file: Path,
    numbers: Floats,  # [params]
    layout: RowLayout,
    manifest: Manifest,
    progress: Progress = lambda: None,
    digest: int = 0,  # of the numbers, if it is known
) -> int:
    """Writes to a file that is new, or was made beforehand, as `write_row`. While the manifest has
    no revision, the file is of that under whose name it is put.
    """
    about = {"layout": layout.encoded.decode(), "manifest": encode_manifest(manifest).decode()}
    if digest:
        about[f"digest.{WEIGHTS}"] = f"{digest:016x}"
    return write_row(file, {WEIGHTS: numbers}, about, progress)


def open_row(file: Path, revision_path: str) -> PublishedRow:
    """Opens the file of a revision. Raises RowMissing, or CheckpointDamaged if the file is anything
    else than that whole row.
    """
    with _damage_of(revision_path):
        row = RowFile.open(file)
    try:
        manifest = decode_manifest(row.about.get("manifest", "").encode())
    except ValueError as error:
        raise CheckpointDamaged(revision_path, file.name, f"has a manifest that {error}") from None
    told = str(manifest.revision_path)
    if told not in (revision_path, revision_path.rpartition("@")[0]):
        raise CheckpointDamaged(revision_path, file.name, f"is that of `{told}`")
    return PublishedRow(row, manifest, RowLayout(row.about["layout"].encode()))


@contextmanager
def _damage_of(revision_path: str) -> Iterator[None]:
    try:
        yield
    except RowMissing:
        raise
    except RowDamaged as error:
        raise CheckpointDamaged(revision_path, error.metadata["file"], error.problem) from error

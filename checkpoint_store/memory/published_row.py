"""The row file of a revision. Beside the numbers it holds the manifest, and the layout by which
they are read where rows lie otherwise.

Trainers and samplers of one host find each other's in memory:
`<folder>/trainer-<random>/<training_run_id>/<name>@<revision>`, in a folder that lies there, such
as one in /dev/shm. Each trainer has its own part, which ends with it. Only the user whose processes
these are can look inside.
"""

import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.manifest import Manifest, decode_manifest, encode_manifest
from checkpoint_store.objects.object_store import is_object_address
from checkpoint_store.paths import CheckpointPath
from checkpoint_store.row_file import WEIGHTS, Progress, RowDamaged, RowFile, RowMissing, write_row
from mint_core.lora.row_layout import Floats, RowLayout

logger = logging.getLogger(__name__)

OWNER_PREFIX = "trainer-"
SHARED_MEMORY = Path("/dev/shm")


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


def find_row(folder: Path, revision: CheckpointPath) -> PublishedRow | None:
    """The row of a revision, if a trainer of this host has it in memory. Raises
    CheckpointDamaged.
    """
    if not folder.exists():
        return None
    if not is_private(folder):
        logger.warning("%s is left alone: others than this user can write there", folder)
        return None
    for owner in folder.glob(f"{OWNER_PREFIX}*"):
        with suppress(RowMissing):
            return open_row(owner / place_of(revision), str(revision))
    return None


def snapshot_folder(chosen: Path | None, store: str) -> Path | None:
    """The folder that was chosen, or else one in shared memory by the store's path or URL; None if
    there is no shared memory here.
    """
    if chosen is not None:
        return chosen
    if not SHARED_MEMORY.is_dir():
        return None
    place = store if is_object_address(store) else Path(store).resolve()
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()
    return SHARED_MEMORY / f"mint-{os.geteuid()}-{digest[:16]}"


def place_of(revision: CheckpointPath) -> Path:
    """Where a revision's file is within its trainer's folder."""
    return Path(revision.training_run_id, f"{revision.name}@{revision.revision}")


def is_private(folder: Path) -> bool:
    """Whether this user alone can have put there what is in it: anyone may make folders in shared
    memory, also under the name that ours would have.
    """
    found = folder.lstat()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return mine and not found.st_mode & 0o077


@contextmanager
def _damage_of(revision_path: str) -> Iterator[None]:
    try:
        yield
    except RowMissing:
        raise
    except RowDamaged as error:
        raise CheckpointDamaged(revision_path, error.metadata["file"], error.problem) from error

"""Where trainers and samplers of one host find each other's snapshots in memory.

`<folder>/trainer-<random>/<training_run_id>/<name>@<revision>`: row files in a folder that lies in
memory, such as one in /dev/shm. Each trainer has its own part, which ends with it. Only the user
whose processes these are can look inside.
"""

import hashlib
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from checkpoint_store.memory.published_row import PublishedRow, open_row
from checkpoint_store.objects.object_store import is_object_address
from checkpoint_store.paths import CheckpointPath
from checkpoint_store.row_file import RowMissing

logger = logging.getLogger(__name__)

OWNER_PREFIX = "trainer-"
SHARED_MEMORY = Path("/dev/shm")


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

"""One name's folder: `<root>/<training_run_id>/<kind>/<name>/<revision>/`.

Revisions are numbers, 1, 2, 3, ... A revision exists from the rename that puts its folder there
until its manifest is removed. The highest number ever given keeps its folder, as a tombstone if
need be, so no number is given twice. Renaming onto a folder that is not empty fails, which is how
two writers of one name, on one host or two, get two numbers.
"""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.manifest import Manifest, decode_manifest
from checkpoint_store.paths import CheckpointPath
from mint_core.fault_points import fault_point

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_LEASE_FILE = "last_used"  # its modification time counts
_TOMBSTONE_FILE = "deleted"
_ANNOUNCEMENT_FILE = "announced"  # in the name's folder; holds the tenant


def live_revisions(folder: Path) -> list[int]:
    """Numbers of the revisions that exist, in order."""
    return [n for n in _numbers(folder) if (folder / str(n) / MANIFEST_FILE).exists()]


def place(staging: Path, folder: Path, prepare: Callable[[int], None]) -> int:
    """Publishes a staged folder under the next free number and returns the number.

    `prepare` learns the number beforehand, again if another writer was quicker.
    """
    make_folder(folder)
    flush_folder(folder.parent)  # an announcement may have made the folder, and not on disk
    while True:
        revision = max(_numbers(folder), default=0) + 1
        prepare(revision)
        fault_point("store:before-publish")
        try:
            staging.rename(folder / str(revision))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            fault_point("store:after-publish")
            flush_folder(folder)
            return revision


def read_manifest(folder: Path, path: CheckpointPath) -> Manifest | None:
    """The manifest of a revision, or None if the revision does not exist."""
    try:
        encoded = (folder / MANIFEST_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = decode_manifest(encoded)
    except ValueError as error:
        raise CheckpointDamaged(str(path), MANIFEST_FILE, str(error)) from None
    if manifest.revision_path != path:
        problem = f"is that of `{manifest.revision_path}`"
        raise CheckpointDamaged(str(path), MANIFEST_FILE, problem)
    return manifest


def rewrite_manifest(folder: Path, encoded: bytes) -> bool:
    """Replaces the manifest of a revision. Returns whether the revision is still there."""
    draft = folder / f".{MANIFEST_FILE}.{uuid4().hex}"
    try:
        write_durably(draft, encoded)
        draft.rename(folder / MANIFEST_FILE)
        flush_folder(folder)
    except FileNotFoundError:
        return False
    if (folder / _TOMBSTONE_FILE).exists():  # it is being buried, maybe past its manifest
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        return False
    return True


def buried_by(folder: Path, request: str) -> int | None:
    """The newest revision that a request has buried, or has begun to; None: it has not."""
    if not request:
        return None
    numbers = [number for number in _numbers(folder) if _epitaph(folder / str(number)) == request]
    return max(numbers, default=None)


def bury(folder: Path, request: str = "") -> None:
    """Removes a revision's files, in the name of a request. Its number stays taken.

    The manifest goes first: killed half way, the revision is gone for readers all the same.
    """
    if not _epitaph(folder):
        write_durably(folder / _TOMBSTONE_FILE, request.encode())
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    flush_folder(folder)
    for file in folder.iterdir():
        if file.name != _TOMBSTONE_FILE:
            file.unlink(missing_ok=True)


def all_dead(folder: Path, since: datetime) -> bool:
    """Whether the name has had revisions, none exists, and nobody will ask who has buried them."""
    numbers = _numbers(folder)
    dead = bool(numbers) and not live_revisions(folder)
    return dead and not any(_remembered(folder / str(number), since) for number in numbers)


def clear_tombstones(folder: Path, since: datetime) -> None:
    """Drops dead revisions below the highest number, those that requests have buried only if that
    was earlier than `since`; and what a burial cut short has left.
    """
    numbers = _numbers(folder)
    live = live_revisions(folder)
    for number in numbers:
        revision = folder / str(number)
        if number in live:
            continue
        if number < numbers[-1] and not _remembered(revision, since):
            shutil.rmtree(revision, ignore_errors=True)
        else:
            bury(revision)


def announce(folder: Path, tenant: str) -> None:
    """Says that the first revision of a name is on its way. Lost in a crash of the machine, which
    is of no harm: so is the revision.
    """
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    draft = folder / f".{_ANNOUNCEMENT_FILE}"
    draft.write_text(tenant)
    draft.rename(folder / _ANNOUNCEMENT_FILE)


def announced(folder: Path) -> str | None:
    """For which tenant a first revision is on its way; None: nobody has said so."""
    try:
        return (folder / _ANNOUNCEMENT_FILE).read_text()
    except FileNotFoundError:
        return None


def recant(folder: Path) -> None:
    """Takes an announcement back, and the name with it if there is nothing else of it."""
    with contextlib.suppress(OSError):  # it has a revision, or never was
        (folder / _ANNOUNCEMENT_FILE).unlink(missing_ok=True)
        folder.rmdir()


def never_came(folder: Path, since: datetime) -> bool:
    """Whether a first revision was announced before that and has not come."""
    try:
        announced_at = (folder / _ANNOUNCEMENT_FILE).stat().st_mtime
    except FileNotFoundError:
        return False
    return not _numbers(folder) and datetime.fromtimestamp(announced_at, UTC) < since


def renew_lease(folder: Path) -> None:
    """Notes that the revision is in use now, as far as this host may write there."""
    try:
        (folder / _LEASE_FILE).touch()
    except FileNotFoundError:
        pass  # deleted meanwhile, or not stored yet
    except OSError as error:
        logger.warning("cannot note the use of %s: %s", folder, error)


def last_used(folder: Path) -> datetime | None:
    """When the revision was last opened; None: never."""
    try:
        return datetime.fromtimestamp((folder / _LEASE_FILE).stat().st_mtime, UTC)
    except FileNotFoundError:
        return None


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, each of them on disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


def write_durably(file: Path, content: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def flush_folder(folder: Path) -> None:
    """Brings the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _epitaph(folder: Path) -> str:
    """Which request has buried a revision, if one has."""
    try:
        return (folder / _TOMBSTONE_FILE).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _remembered(folder: Path, since: datetime) -> bool:
    """Whether a request that may be sent again has buried a revision."""
    if not _epitaph(folder):
        return False
    return datetime.fromtimestamp((folder / _TOMBSTONE_FILE).stat().st_mtime, UTC) >= since


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
    except FileNotFoundError:
        return []

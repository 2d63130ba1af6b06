"""One name's folder: `<root>/<training_run_id>/<kind>/<name>/<revision>/`. What is different in an
object store is in `places` and `object_revisions`.

Revisions are numbers, 1, 2, 3, ... A revision exists from the rename that puts its folder there
until its manifest is removed. The highest number ever given keeps its folder, as a tombstone if
need be, so no number is given twice. Renaming onto a folder that is not empty fails, which is how
two writers of one name, on one host or two, get two numbers.
"""

import contextlib
import errno
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from checkpoint_store.errors import FULL, CheckpointDamaged, ObjectStoreFailed
from checkpoint_store.manifest import MANIFEST_FILE, Manifest, decode_manifest
from checkpoint_store.objects import object_revisions, places
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.paths import CheckpointPath
from checkpoint_store.store_files import problem_of
from mint_core.errors import AlreadyExists
from mint_core.fault_points import fault_point

logger = logging.getLogger(__name__)

_NUMBER = re.compile("[1-9][0-9]{0,17}")
_LEASE_FILE = "last_used"  # its modification time counts
_TOMBSTONE_FILE = "deleted"
_ANNOUNCEMENT_FILE = "announced"  # in the name's folder; holds the tenant


def live_revisions(folder: places.Place) -> list[int]:
    """Numbers of the revisions that exist, in order."""
    return [n for n in numbers(folder) if (folder / str(n) / MANIFEST_FILE).exists()]


def place(staging: Path, folder: places.Place, prepare: Callable[[int], None]) -> int:
    """Publishes a staged folder under the next free number and returns the number.

    `prepare` learns the number beforehand, again if another writer was quicker.
    """
    places.make_folder(folder)
    if isinstance(folder, ObjectPath):
        object_revisions.send(staging, folder)
    while True:
        revision = max(numbers(folder), default=0) + 1
        try:
            prepare(revision)
        except AlreadyExists:
            settle(folder)
            if isinstance(folder, ObjectPath):
                object_revisions.take_back(staging, folder)
            raise
        fault_point("store:before-publish")
        if _show(staging, folder / str(revision)):
            fault_point("store:after-publish")
            settle(folder)
            return revision


def settle(folder: places.Place) -> None:
    """Brings to disk which revisions a name has. Processes see what others have placed before it
    is there, and may not rely on it: those others may have been killed.
    """
    if isinstance(folder, Path):
        for above in (folder, *folder.parents[:3]):  # up to the root
            places.flush_folder(above)


def read_manifest(folder: places.Place, path: CheckpointPath) -> Manifest | None:
    """The manifest of a revision, or None if the revision does not exist."""
    try:
        manifest = decode_manifest(places.read(folder / MANIFEST_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        problem = problem_of(error) if isinstance(error, OSError) else str(error)
        raise CheckpointDamaged(str(path), MANIFEST_FILE, problem) from None
    if manifest.revision_path != path:
        problem = f"is that of `{manifest.revision_path}`"
        raise CheckpointDamaged(str(path), MANIFEST_FILE, problem)
    return manifest


def rewrite_manifest(folder: places.Place, encoded: bytes) -> bool:
    """Replaces the manifest of a revision. Returns whether the revision is still there."""
    if not (folder / MANIFEST_FILE).exists():
        return False
    try:
        places.replace(folder / MANIFEST_FILE, encoded, durably=True)
    except FileNotFoundError:
        return False
    if (folder / _TOMBSTONE_FILE).exists():  # it is being buried, maybe past its manifest
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        return False
    return True


def buried_by(folder: places.Place, request: str) -> int | None:
    """The newest revision that a request has buried, or has begun to; None: it has not."""
    if not request:
        return None
    buried = [number for number in numbers(folder) if _epitaph(folder / str(number)) == request]
    return max(buried, default=None)


def bury(folder: places.Place, request: str = "") -> None:
    """Removes a revision's files, in the name of a request. Its number stays taken.

    The manifest goes first, on disk too: killed half way, or when the power goes, the revision is
    gone for readers all the same.
    """
    elsewhere = object_revisions.files_of(folder) if isinstance(folder, ObjectPath) else []
    full = False
    try:
        if not _epitaph(folder):
            places.replace(folder / _TOMBSTONE_FILE, request.encode(), durably=True)
    except OSError as error:
        if error.errno not in FULL or not isinstance(folder, Path):
            raise
        full = True
        with contextlib.suppress(FileNotFoundError):  # a disk without room takes this
            (folder / MANIFEST_FILE).rename(folder / _TOMBSTONE_FILE)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    places.flush_folder(folder)
    for file in [*folder.iterdir(), *elsewhere]:
        if file.name != _TOMBSTONE_FILE:
            places.remove(file)
    if full:
        with contextlib.suppress(OSError):  # or the same request, sent again, finds nothing
            places.replace(folder / _TOMBSTONE_FILE, request.encode(), durably=True)


def settle_burials(folder: places.Place) -> None:
    """Brings to disk which revisions of a name are gone, whoever has buried them."""
    for number in numbers(folder):
        if not (folder / str(number) / MANIFEST_FILE).exists():
            with contextlib.suppress(FileNotFoundError):  # a sweep has just removed what was left
                places.flush_folder(folder / str(number))


def has_ended(folder: places.Place, since: datetime) -> bool:
    """Whether no revision of the name exists, and nobody will ask for one, or who has buried it:
    one may still come if it was announced after `since`.
    """
    given = numbers(folder)
    if not given:
        announced_at = _written(folder / _ANNOUNCEMENT_FILE)
        return announced_at is not None and announced_at < since
    remembered = (_remembered(folder / str(number), since) for number in given)
    return not live_revisions(folder) and not any(remembered)


def clear_tombstones(folder: places.Place, since: datetime) -> None:
    """Drops dead revisions below the highest number, those that requests have buried only if that
    was earlier than `since`; and what a burial cut short has left.
    """
    given = numbers(folder)
    live = live_revisions(folder)
    for number in given:
        revision = folder / str(number)
        if number in live:
            continue
        if number < given[-1] and not _remembered(revision, since):
            places.remove_tree(revision)
        else:
            bury(revision)


def announce(folder: places.Place, tenant: str) -> None:
    """Says that the first revision of a name is on its way. Lost in a crash of the machine, which
    is of no harm: so is the revision.
    """
    places.make_folder(folder.parent)
    if isinstance(folder, Path):
        folder.mkdir(exist_ok=True)
    places.replace(folder / _ANNOUNCEMENT_FILE, tenant.encode(), durably=False)


def announced(folder: places.Place) -> str:
    """For which tenant a first revision is on its way; empty: nobody has said so."""
    return _text(folder / _ANNOUNCEMENT_FILE)


def recant(folder: places.Place) -> None:
    """Takes an announcement back, and the name with it if there is nothing else of it."""
    with contextlib.suppress(OSError, ObjectStoreFailed):  # it has a revision, or never was
        (folder / _ANNOUNCEMENT_FILE).unlink(missing_ok=True)
        folder.rmdir()


def renew_lease(folder: places.Place) -> None:
    """Notes that the revision is in use now, as far as this host may write there."""
    try:
        if (folder / MANIFEST_FILE).exists():  # a lease alone would take the number
            places.replace(folder / _LEASE_FILE, b"", durably=False)
    except FileNotFoundError:
        pass  # deleted meanwhile, or not stored yet
    except (OSError, ObjectStoreFailed) as error:
        logger.warning("cannot note the use of %s: %s", folder, error)


def last_used(folder: places.Place) -> datetime | None:
    """When the revision was last opened; None: never."""
    return _written(folder / _LEASE_FILE)


def _show(staging: Path, folder: places.Place) -> bool:
    """Puts a revision where readers look; False if another is there."""
    if isinstance(folder, ObjectPath):
        return object_revisions.show(staging, folder)
    try:
        staging.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _epitaph(folder: places.Place) -> str:
    """Which request has buried a revision, if one has."""
    return _text(folder / _TOMBSTONE_FILE)


def _remembered(folder: places.Place, since: datetime) -> bool:
    """Whether a request that may be sent again has buried a revision."""
    buried_at = _written(folder / _TOMBSTONE_FILE) if _epitaph(folder) else None
    return buried_at is not None and buried_at >= since


def _text(file: places.Place) -> str:
    """Empty if there is no such file, or none that can be read."""
    try:
        return places.read(file).decode(errors="replace")
    except OSError:
        return ""


def _written(file: places.Place) -> datetime | None:
    """When a file was written last; None: there is none."""
    if isinstance(file, ObjectPath):
        return file.objects.find(file.key)
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC)
    except OSError:
        return None


def numbers(folder: places.Place) -> list[int]:
    """All that were ever given, of those that are not forgotten, in order."""
    try:
        return sorted(int(e.name) for e in folder.iterdir() if _NUMBER.fullmatch(e.name))
    except (FileNotFoundError, NotADirectoryError):
        return []

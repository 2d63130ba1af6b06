"""What differs between a folder and an object store, below the store's own ways."""

import contextlib
import os
import shutil
from pathlib import Path
from uuid import uuid4

from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.paths import CheckpointPath, is_name
from checkpoint_store.store_files import read_file
from mint_core import durable_files

Place = Path | ObjectPath


def folder_of(root: Place, path: CheckpointPath) -> Place:
    """Of a name, or of a revision. Raises CheckpointDamaged where a link may lead elsewhere."""
    revision = [] if path.revision is None else [str(path.revision)]
    for part in (path.training_run_id, path.kind, path.name, *revision):
        root = root / part
        if isinstance(root, Path) and root.is_symlink():
            raise CheckpointDamaged(str(path), part, "is a link, which may lead out of the store")
    return root


def folders_in(place: Place) -> list[str]:
    """Names of the store's folders in one of them, in order; none if it does not exist."""
    found: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if isinstance(place, ObjectPath):
            found = [key.rpartition("/")[2] for key in place.objects.children(place.key)[0]]
        else:
            found = [e.name for e in os.scandir(place) if e.is_dir(follow_symlinks=False)]
    return sorted(filter(is_name, found))


def make_folder(place: Place) -> None:
    """Makes a folder and its parents, each of them on disk."""
    if isinstance(place, Path):
        durable_files.make_folder(place)


def read(place: Place) -> bytes:
    """A small file. Raises OSError over whatever is none, or large."""
    return read_file(place) if isinstance(place, Path) else place.read_bytes()


def replace(place: Place, content: bytes, *, durably: bool) -> None:
    """Makes or replaces what others read meanwhile: they see all of the new content, or what was
    there. Unless it is done `durably`, a crash of the machine may undo it.
    """
    if isinstance(place, ObjectPath):
        place.objects.write(place.key, content)
        return
    draft = place.with_name(f".{place.name}.{uuid4().hex}")
    try:
        if durably:
            durable_files.write_durably(draft, content)
        else:
            draft.write_bytes(content)
        draft.rename(place)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    if durably:
        flush_folder(place.parent)


def flush_folder(place: Place) -> None:
    """Brings the entries of a folder to disk."""
    if isinstance(place, Path):
        durable_files.flush_folder(place)


def remove(place: Place) -> None:
    """Removes what is there, a folder too: others may have put it there."""
    if isinstance(place, Path) and place.is_dir() and not place.is_symlink():
        remove_tree(place)
    else:
        place.unlink(missing_ok=True)


def remove_tree(place: Place) -> None:
    """Removes all that is in a folder, as far as that works."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    else:
        for key in place.objects.below(place.key):
            place.objects.remove(key)

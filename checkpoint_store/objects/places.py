"""What differs between a folder and an object store, below the store's own ways."""

import shutil
from pathlib import Path
from uuid import uuid4

from checkpoint_store.objects.object_path import ObjectPath
from mint_core import durable_files

Place = Path | ObjectPath


def make_folder(place: Place) -> None:
    """Makes a folder and its parents, each of them on disk."""
    if isinstance(place, Path):
        durable_files.make_folder(place)


def write_durably(place: Place, content: bytes) -> None:
    if isinstance(place, Path):
        durable_files.write_durably(place, content)
    else:
        place.objects.write(place.key, content)


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


def remove_tree(place: Place) -> None:
    """Removes all that is in a folder, as far as that works."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    else:
        for key in place.objects.below(place.key):
            place.objects.remove(key)

"""How a revision comes into an object store, where nothing can be renamed.

    <name>/<files folder>/adapter_model.safetensors, ...    first, each writer's by themselves
    <name>/<revision>/manifest.json                         last, where there is none: this shows it

The manifest says in which folder the files are. Whoever dies in between leaves a folder that no
manifest names, and that a sweep removes.
"""

from datetime import datetime
from pathlib import Path

from checkpoint_store.manifest import MANIFEST_FILE, decode_manifest
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.objects.places import remove_tree

_PREFIX = "files-"  # no revision is called so


def files_folder(staging: Path) -> str:
    """The name of the folder for what is staged, which is nobody else's."""
    return f"{_PREFIX}{staging.name}"


def send(staging: Path, name: ObjectPath) -> None:
    """Copies what is staged to where nobody looks yet."""
    target = name / files_folder(staging)
    for file in sorted(staging.iterdir()):
        target.objects.write((target / file.name).key, file)


def take_back(staging: Path, name: ObjectPath) -> None:
    """Removes what was sent and will not be shown."""
    remove_tree(name / files_folder(staging))


def show(staging: Path, revision: ObjectPath) -> bool:
    """Publishes what was sent, unless there is such a revision. What fails may have succeeded."""
    place = revision / MANIFEST_FILE
    return place.objects.create(place.key, (staging / MANIFEST_FILE).read_bytes())


def files_of(revision: ObjectPath) -> list[ObjectPath]:
    """The files of a revision; none if they cannot be told."""
    try:
        folder = decode_manifest((revision / MANIFEST_FILE).read_bytes()).files_folder
    except (OSError, ValueError):
        return []
    return list((revision.parent / folder).iterdir()) if folder else []


def remove_unnamed(name: ObjectPath, named: set[str], since: datetime) -> None:
    """Removes folders of files that no manifest names, unless somebody may still be sending."""
    for folder in name.iterdir():
        if not folder.name.startswith(_PREFIX) or folder.name in named:
            continue
        objects = folder.objects.below(folder.key).values()
        if max((entry["last_modified"] for entry in objects), default=since) < since:
            remove_tree(folder)

"""Stores by what a service was told."""

from pathlib import Path

from checkpoint_store.memory.snapshot_folder import SnapshotFolder
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.objects.object_store import ObjectStore, is_object_address, parse_address
from checkpoint_store.store import CheckpointStore


def open_store(
    store: str, local: Path, snapshots: SnapshotFolder | None = None, *, saves: bool
) -> CheckpointStore:
    """A folder, or an object store by its URL, which is asked whether it can be used; `local` is
    for copies of its files then. `saves` says whether this process will.
    """
    if not is_object_address(store):
        return CheckpointStore(Path(store), snapshots)
    objects = ObjectStore(parse_address(store))
    objects.check(saves=saves)
    root = ObjectPath(objects, objects.address.prefix)
    return CheckpointStore(root, snapshots, local)

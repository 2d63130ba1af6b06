"""Publishes, opens, lists and deletes adapters and training state. Arrays are numpy: no torch."""

from checkpoint_store.errors import CheckpointDamaged, WeightsNotFinite
from checkpoint_store.manifest import FileEntry, Manifest, new_manifest
from checkpoint_store.memory.published_row import (
    PublishedRow,
    find_row,
    open_row,
    snapshot_folder,
    write_published_row,
)
from checkpoint_store.memory.snapshot_memory import SnapshotMemory
from checkpoint_store.paths import (
    KINDS,
    MERGED_WEIGHTS,
    SAMPLER_WEIGHTS,
    WEIGHTS,
    CheckpointKind,
    CheckpointPath,
    check_name,
    parse_path,
)
from checkpoint_store.store import CheckpointStore, OpenCheckpoint, Swept, open_store

__all__ = [
    "KINDS",
    "MERGED_WEIGHTS",
    "SAMPLER_WEIGHTS",
    "WEIGHTS",
    "CheckpointDamaged",
    "CheckpointKind",
    "CheckpointPath",
    "CheckpointStore",
    "FileEntry",
    "Manifest",
    "OpenCheckpoint",
    "PublishedRow",
    "SnapshotMemory",
    "Swept",
    "WeightsNotFinite",
    "check_name",
    "find_row",
    "new_manifest",
    "open_row",
    "open_store",
    "parse_path",
    "snapshot_folder",
    "write_published_row",
]

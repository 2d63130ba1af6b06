"""Publishes, opens, lists and deletes adapters and training state. Arrays are numpy: no torch."""

from checkpoint_store.errors import CheckpointDamaged, WeightsNotFinite
from checkpoint_store.manifest import FileEntry, Manifest
from checkpoint_store.opened import OpenCheckpoint
from checkpoint_store.paths import (
    SAMPLER_WEIGHTS,
    WEIGHTS,
    CheckpointKind,
    CheckpointPath,
    check_name,
    parse_path,
)
from checkpoint_store.store import CheckpointStore, Published

__all__ = [
    "SAMPLER_WEIGHTS",
    "WEIGHTS",
    "CheckpointDamaged",
    "CheckpointKind",
    "CheckpointPath",
    "CheckpointStore",
    "FileEntry",
    "Manifest",
    "OpenCheckpoint",
    "Published",
    "WeightsNotFinite",
    "check_name",
    "parse_path",
]

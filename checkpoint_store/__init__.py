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
from checkpoint_store.opening import AdapterStore, is_wire_address, open_store
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
from checkpoint_store.store import CheckpointStore, OpenCheckpoint, Swept

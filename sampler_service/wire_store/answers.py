"""What a trainer says of a checkpoint: believed no further than what a manifest says."""

import re
from datetime import UTC

from checkpoint_store.manifest import FileEntry, Manifest
from checkpoint_store.paths import CheckpointPath, is_name, is_path, parse_path
from mint_core.lora.spec import AdapterSpec
from mintrpc.v1 import checkpoint_pb2

_SHA256 = re.compile("[0-9a-f]{64}")


def manifest_of(told: checkpoint_pb2.Checkpoint, asked: CheckpointPath, tenant: str) -> Manifest:
    """Of a tenant's adapter that was asked for. Raises ValueError."""
    revision = parse_path(told.revision_path) if is_path(told.revision_path) else None
    if revision is None or revision.revision is None or not asked.covers(revision):
        raise ValueError(f"its path is {told.revision_path!r}")
    config = told.lora_config
    return Manifest(
        tenant=tenant,
        training_run_id=revision.training_run_id,
        kind=revision.kind,
        name=revision.name,
        revision=revision.revision,
        base_model=told.base_model,
        base_fingerprint=told.base_fingerprint,
        spec=AdapterSpec(
            rank=config.rank,
            alpha=config.alpha,
            use_rslora=config.use_rslora,
            seed=config.seed,
            modules=tuple(config.target_modules),
        ),
        step=told.step,
        create_time=told.create_time.ToDatetime(UTC),
        files={file.name: _entry(file) for file in told.files},
    )


def _entry(file: checkpoint_pb2.CheckpointFile) -> FileEntry:
    if not is_name(file.name) or file.size_bytes < 0 or not _SHA256.fullmatch(file.sha256):
        raise ValueError(f"a file is {file.name!r}, of {file.size_bytes} bytes")
    return FileEntry(file.size_bytes, file.sha256)

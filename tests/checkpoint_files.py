"""Checkpoints written and read as a trainer does."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_store import CheckpointStore, Manifest, OpenCheckpoint, new_manifest
from checkpoint_store.adapter_files import OPTIMIZER_FILE, check_arrays, read_moments, write_files
from mint_core.lora.spec import AdapterArrays
from trainer_service.jobs import Source


def publish_checkpoint(
    store: CheckpointStore,
    *,
    weights: AdapterArrays,
    exp_avg: AdapterArrays | None = None,
    exp_avg_sq: AdapterArrays | None = None,
    overwrite: bool = True,
    name: str | None,
    **said: Any,
) -> Manifest:
    """Makes a checkpoint with the manifest that `new_manifest` makes of what is said of it."""
    manifest = new_manifest(name, Manifest(**said))
    return publish_as(store, manifest, weights, exp_avg, exp_avg_sq, overwrite=overwrite)


def publish_as(
    store: CheckpointStore,
    manifest: Manifest,
    weights: AdapterArrays,
    exp_avg: AdapterArrays | None = None,
    exp_avg_sq: AdapterArrays | None = None,
    *,
    overwrite: bool = True,
) -> Manifest:
    moments = None
    if exp_avg is not None and exp_avg_sq is not None:
        moments = exp_avg, exp_avg_sq
    for arrays in (weights, *(moments or ())):
        check_arrays(str(manifest.path), manifest.spec, arrays)
    with store.staging() as folder:
        files = write_files(
            folder,
            weights,
            moments,
            spec=manifest.spec,
            base_model=manifest.base_model,
            base_fingerprint=manifest.base_fingerprint,
            step=manifest.step,
        )
        return store.publish_folder(replace(manifest, files=files), folder, overwrite=overwrite)


def moments(opened: OpenCheckpoint) -> tuple[AdapterArrays, AdapterArrays]:
    """First and second; empty of an adapter alone."""
    if OPTIMIZER_FILE not in opened.manifest.files:
        return {}, {}
    return read_moments(opened.folder)


def parts_of(opened: OpenCheckpoint) -> dict[str, AdapterArrays]:
    """All arrays, as `publish_checkpoint` takes them."""
    exp_avg, exp_avg_sq = moments(opened)
    return {"weights": opened.weights(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def source_of(manifest: Manifest, folder: Path, *, with_optimizer: bool) -> Source:
    return Source(
        revision_path=str(manifest.revision_path),
        spec=manifest.spec,
        folder=str(folder),
        row_file="",
        with_optimizer=with_optimizer,
        step=manifest.step if with_optimizer else 0,
    )


def same(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """Whether arrays are the same to the bit."""
    return ours.keys() == theirs.keys() and all(
        ours[name].tobytes() == theirs[name].tobytes() for name in theirs
    )

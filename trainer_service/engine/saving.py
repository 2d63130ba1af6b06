"""Rows to files, most of them in the background, and back: saved rows, and what checkpoints hold as
arrays by PEFT's names.
"""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_store import FileEntry, Manifest, open_row, write_published_row
from checkpoint_store.adapter_files import (
    Moments,
    check_arrays,
    read_moments,
    read_weights,
    write_files,
)
from checkpoint_store.errors import full_disk_told
from checkpoint_store.row_file import Progress, RowDamaged, RowFile, RowMissing, save_row
from mint_core.engine_host.carried import here
from mint_core.errors import CheckpointNotFound
from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.spec import AdapterArrays
from mint_core.model.loading import LoadedBase
from trainer_service import jobs
from trainer_service.engine.digests import digest
from trainer_service.engine.trained_row import TrainedRow
from trainer_service.errors import RowNotSaved, RowNotWritten

# What is left of a job when its row may change again. Calls what it is given now and then, and
# returns the job's answer.
Rest = Callable[[Progress], object]


def save_row_later(
    job: jobs.SaveRow,
    trained: TrainedRow,
    kept: Mapping[Part, Tensor],  # what of the row is needed to go on, each [params]
    base: LoadedBase,
    folder: Path,
) -> Rest:
    """Copies a row."""
    parts = {part.value: vector.detach().to("cpu", copy=True) for part, vector in kept.items()}
    about = {
        "training_run_id": job.training_run_id,
        "sequence": str(job.sequence),
        "step": str(trained.step),
        "gradient_pending": str(int(trained.gradient_pending)),
        "adapter": json.dumps(asdict(trained.row.spec)),
        "base_fingerprint": base.description.fingerprint,
        "engine": json.dumps(engine_traits(base)),
        "layout": trained.row.bank.layout.encoded.decode(),  # older files lack it
    }

    def write(progress: Progress) -> jobs.SavedRow:
        arrays = {part: vector.numpy() for part, vector in parts.items()}
        name = jobs.saved_row_name(job.training_run_id, job.sequence)
        try:
            size_bytes = save_row(folder / name, arrays, about, progress)
        except OSError as error:
            raise RowNotSaved(error) from error
        return jobs.SavedRow(job.sequence, name, size_bytes)

    return write


def engine_traits(base: LoadedBase) -> dict[str, str]:
    """On what a row's numbers may depend, beside all that is in the journal."""
    device = base.device
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if base.by_onednn:
        processor += ", products by oneDNN"
    if base.description.bits_traded_for_speed:
        processor += ", bits traded for speed"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "dtype": base.description.dtype,
        "threads": str(torch.get_num_threads()),
    }


def read_saved_row(file: RowFile, row: AdapterRow) -> None:
    """Fills the parts of a row from its file. Raises RowDamaged."""
    layout = row.bank.layout.encoded.decode()
    if file.length != row.bank.row_size or file.about.get("layout", layout) != layout:
        raise RowDamaged(file.path, "lies otherwise in memory than this version's rows")
    for part in file.digests:
        row.part(Part(part)).copy_(torch.from_numpy(file.read(part)))


def difference(file: RowFile, base: LoadedBase) -> str:
    """In which way the engine that wrote a file was another than this one."""
    theirs, ours = json.loads(file.about["engine"]), engine_traits(base)
    return ", ".join(
        f"{name} was {theirs.get(name)} and is {value}"
        for name, value in ours.items()
        if theirs.get(name) != value
    )


def save_checkpoint_later(job: jobs.SaveCheckpoint, trained: TrainedRow) -> Rest:
    """Copies weights, and moments if they are asked for."""
    row = trained.row
    weights = row.export(Part.WEIGHTS)
    moments = None
    if job.with_optimizer:
        moments = row.export(Part.EXP_AVG), row.export(Part.EXP_AVG_SQ)
    return lambda progress: _write_checkpoint(
        job.folder, job.manifest, weights, moments, progress=progress
    )


def store_row_later(job: jobs.StoreRow) -> Rest:
    """Of a row file, which may lie in memory."""

    def write(progress: Progress) -> Mapping[str, FileEntry]:
        weights = open_row(here(job.file), str(job.manifest.revision_path)).weights()
        return _write_checkpoint(job.folder, job.manifest, weights, progress=progress)

    return write


def _write_checkpoint(
    folder: str,
    manifest: Manifest,
    weights: AdapterArrays,
    moments: Moments | None = None,
    *,
    progress: Progress,
) -> Mapping[str, FileEntry]:
    for arrays in (weights, *(moments or ())):
        check_arrays(str(manifest.path), manifest.spec, arrays)
        progress()
    with full_disk_told():
        return write_files(
            here(folder),
            weights,
            moments,
            spec=manifest.spec,
            base_model=manifest.base_model,
            base_fingerprint=manifest.base_fingerprint,
            step=manifest.step,
            progress=progress,
        )


def read_source(source: jobs.Source) -> dict[Part, AdapterArrays]:
    """The parts of a row that a checkpoint holds and that are asked for. Raises CheckpointNotFound
    if it was deleted meanwhile, CheckpointDamaged, InvalidRequest.
    """
    parts: dict[Part, AdapterArrays] = {}
    try:
        if source.row_file:
            parts[Part.WEIGHTS] = open_row(here(source.row_file), source.revision_path).weights()
        else:
            parts[Part.WEIGHTS] = read_weights(here(source.folder))
        if source.with_optimizer:
            parts[Part.EXP_AVG], parts[Part.EXP_AVG_SQ] = read_moments(here(source.folder))
    except (FileNotFoundError, RowMissing):
        raise CheckpointNotFound(source.revision_path) from None
    for arrays in parts.values():
        check_arrays(source.revision_path, source.spec, arrays)
    return parts


def write_weights(job: jobs.WriteRow, trained: TrainedRow, progress: Progress) -> None:
    """Writes the file from which samplers map a row. Raises WeightsNotFinite, RowNotWritten."""
    row, file, path = trained.row, here(job.file), str(job.manifest.path)
    vector = row.part(Part.WEIGHTS)
    if not vector.sum().isfinite():  # else all of them are; 20 times as fast as to ask each
        check_arrays(path, job.manifest.spec, row.export(Part.WEIGHTS))
    trained.weight_digest = known = trained.weight_digest or digest(vector)
    numbers, layout = vector.cpu().numpy(), row.bank.layout
    try:
        write_published_row(file, numbers, layout, job.manifest, progress, known)
    except OSError as error:
        raise RowNotWritten(path, Path(job.file).parent, error) from error

"""What rows are filled from, as arrays by PEFT's names."""

from pathlib import Path

from checkpoint_store import open_row
from checkpoint_store.adapter_files import check_arrays, read_moments, read_weights
from checkpoint_store.row_file import RowMissing
from mint_core.errors import CheckpointNotFound
from mint_core.lora.bank import Part
from mint_core.lora.spec import AdapterArrays
from trainer_service.jobs import Source


def read_source(source: Source) -> dict[Part, AdapterArrays]:
    """The parts of a row that a checkpoint holds and that are asked for. Raises CheckpointNotFound
    if it was deleted meanwhile, CheckpointDamaged, InvalidRequest.
    """
    parts = {}
    try:
        parts[Part.WEIGHTS] = _weights(source)
        if source.with_optimizer:
            parts[Part.EXP_AVG], parts[Part.EXP_AVG_SQ] = read_moments(Path(source.folder))
    except (FileNotFoundError, RowMissing):
        raise CheckpointNotFound(source.revision_path) from None
    for arrays in parts.values():
        check_arrays(source.revision_path, source.spec, arrays)
    return parts


def _weights(source: Source) -> AdapterArrays:
    if source.row_file:
        return open_row(Path(source.row_file), source.revision_path).weights()
    return read_weights(Path(source.folder))

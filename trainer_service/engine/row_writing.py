"""Writes a row's weights to a file from which samplers map them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from checkpoint_store import WeightsNotFinite, write_published_row
from mint_core.lora.bank import AdapterRow, Part
from trainer_service.errors import RowNotWritten
from trainer_service.jobs import WriteRow


def write_weights(job: WriteRow, row: AdapterRow, progress: Callable[[], None]) -> None:
    """Raises WeightsNotFinite, RowNotWritten."""
    vector, file = row.part(Part.WEIGHTS), Path(job.file)
    _check_finite(row, vector, job.path)
    try:
        write_published_row(file, vector.cpu().numpy(), row.bank.layout, job.manifest, progress)
    except OSError as error:
        raise RowNotWritten(job.path, file.parent, error) from error


def _check_finite(row: AdapterRow, vector: Tensor, path: str) -> None:
    if vector.sum().isfinite():  # so all of them are; 20 times as fast as to ask each
        return
    for name, array in row.export(Part.WEIGHTS).items():
        if not np.isfinite(array).all():
            raise WeightsNotFinite(path, name)

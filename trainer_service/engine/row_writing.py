"""Writes a row's weights to a file, as they lie in memory."""

import os
from pathlib import Path

import numpy as np
from torch import Tensor

from checkpoint_store import WeightsNotFinite
from mint_core.lora.bank import AdapterRow, Part
from trainer_service.errors import RowNotWritten


def write_row(row: AdapterRow, file: Path, path: str) -> None:
    """Writes to a file that is new, or was made in that size beforehand. `path` names the
    checkpoint in errors. Raises WeightsNotFinite, RowNotWritten.
    """
    vector = row.part(Part.WEIGHTS)
    _check_finite(row, vector, path)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
        with open(descriptor, "wb") as opened:
            opened.write(vector.cpu().numpy().data.cast("B"))
    except OSError as error:
        raise RowNotWritten(path, file.parent, error) from error


def _check_finite(row: AdapterRow, vector: Tensor, path: str) -> None:
    if vector.sum().isfinite():  # so all of them are; 20 times as fast as to ask each
        return
    for name, array in row.export(Part.WEIGHTS).items():
        if not np.isfinite(array).all():
            raise WeightsNotFinite(path, name)

"""Weights of the base model in an adapter's file. PEFT puts embedding and head there when the head
is adapted; they say nothing new, and what differs from the base would be lost.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from checkpoint_store.foreign.tensor_file import TensorFile
from mint_core.engine_host.pipe import ModelDescription

_PREFIX = "base_model.model."
_ROWS = 4096  # compared at a time
# Whoever loaded the base in bfloat16 saved it rounded to 8 bits; float16 has few bits left near 0.
_RELATIVE_ERROR, _ABSOLUTE_ERROR = 2.0**-8, 1e-7


def check_base_copies(file: TensorFile, names: Iterable[str], model: ModelDescription) -> None:
    """Refuses tensors that are not, up to rounding, those of the base model."""
    names = list(names)
    paths = sorted(Path(model.folder).glob("*.safetensors")) if names else []
    files = [TensorFile(path, path.name) for path in paths]
    for name in names:
        base = _find(files, name.removeprefix(_PREFIX).replace(".base_layer.", "."))
        if not name.startswith(_PREFIX) or base is None:
            raise file.refused(
                f"holds `{name}`, which is neither A nor B of a linear layer, nor a copy of the "
                "base model's; train plain LoRA",
                tensor=name,
            )
        if not _same(file, name, *base):
            raise file.refused(
                f"holds `{name}` with other numbers than the base model's; trained or resized "
                "embeddings are not supported: train plain LoRA",
                tensor=name,
            )


def _find(files: Iterable[TensorFile], name: str) -> tuple[TensorFile, str] | None:
    """Where the base model has a tensor. A head that is tied is the embedding."""
    for file in files:
        if name in file.tensors:
            return file, name
    if name == "lm_head.weight":
        for file in files:
            for other in file.tensors:
                if other.endswith("embed_tokens.weight"):
                    return file, other
    return None


def _same(file: TensorFile, name: str, base: TensorFile, base_name: str) -> bool:
    shape = base.tensors[base_name].shape
    if file.tensors[name].shape != shape:
        return False
    for start in range(0, shape[0] if shape else 1, _ROWS):
        rows = slice(start, start + _ROWS)
        theirs, ours = file.float32(name, rows), base.float32(base_name, rows)
        if not (np.abs(theirs - ours) <= _RELATIVE_ERROR * np.abs(ours) + _ABSOLUTE_ERROR).all():
            return False
    return True

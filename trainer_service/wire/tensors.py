"""Tensors of training requests, in the shape that their data want."""

import numpy as np
from numpy.typing import NDArray

from mint_core import tensors
from mint_core.errors import InvalidRequest
from mintrpc.v1 import types_pb2
from trainer_service.jobs import Floats


def read_floats(tensor: types_pb2.TensorData, path: str, shape: tuple[int, ...]) -> Floats:
    """Finite float32 values of that shape."""
    array = tensors.read_floats(tensor, path)
    _check_shape(array.shape, path, shape)
    finite = np.isfinite(array)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        value = array.ravel()[bad[0]]
        raise InvalidRequest(
            f"`{path}` has {value} at position {bad[0]}; all its values must be finite",
            field=path,
            value=value,
            position=bad[0],
        )
    return array


def read_integers(
    tensor: types_pb2.TensorData, path: str, shape: tuple[int, ...]
) -> NDArray[np.int64]:
    """int64 values of that shape."""
    array = tensors.read_integers(tensor, path)
    _check_shape(array.shape, path, shape)
    return array


def _check_shape(shape: tuple[int, ...], path: str, wanted: tuple[int, ...]) -> None:
    if shape == wanted:
        return
    length = wanted[0]
    wanted_by = (
        f"`model_input` has {length} tokens; give one value per token"
        if len(wanted) == 1
        else f"`target_tokens` has {list(wanted)}; give one value per target"
    )
    raise InvalidRequest(
        f"`{path}` has shape {list(shape)} but {wanted_by}",
        field=path,
        shape=list(shape),
        tokens=length,
    )

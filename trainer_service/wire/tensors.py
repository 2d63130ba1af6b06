"""Tensors of training requests: protobuf in, checked numpy arrays out."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mint_core.errors import InvalidRequest
from mintrpc.v1 import types_pb2
from trainer_service.jobs import Floats

_DTYPES: Mapping[int, np.dtype[np.generic]] = {
    types_pb2.TENSOR_DTYPE_FLOAT32: np.dtype("<f4"),
    types_pb2.TENSOR_DTYPE_INT64: np.dtype("<i8"),
}


def read_floats(tensor: types_pb2.TensorData, path: str, shape: tuple[int, ...]) -> Floats:
    """Finite float32 values of that shape."""
    array = _array(tensor, path, types_pb2.TENSOR_DTYPE_FLOAT32, shape).astype(
        np.float32, copy=False
    )
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
    return _array(tensor, path, types_pb2.TENSOR_DTYPE_INT64, shape).astype(np.int64, copy=False)


def _array(
    tensor: types_pb2.TensorData, path: str, wanted: int, wanted_shape: tuple[int, ...]
) -> NDArray[np.generic]:
    """Reads a tensor that must be of that shape."""
    if tensor.dtype != wanted:
        raise InvalidRequest(
            f"`{path}.dtype` is {_dtype_name(tensor.dtype)} but must be {_dtype_name(wanted)}; "
            "convert the values",
            field=f"{path}.dtype",
            dtype=_dtype_name(tensor.dtype),
        )
    dtype, values = _DTYPES[wanted], tensor.values
    count, rest = divmod(len(values), dtype.itemsize)
    shape = tuple(tensor.shape) or (count,)
    # First the lengths: a product of many large ones is long in the making.
    if rest or min(shape) < 0 or max(shape) >= 2**31 or math.prod(shape) != count:
        raise InvalidRequest(
            f"`{path}.values` has {len(values)} bytes, which is not {dtype.itemsize} times the "
            f"product of shape {list(shape)}; send every value once",
            field=f"{path}.values",
            size_bytes=len(values),
        )
    if shape != wanted_shape:
        length = wanted_shape[0]
        wanted_by = (
            f"`model_input` has {length} tokens; give one value per token"
            if len(wanted_shape) == 1
            else f"`target_tokens` has {list(wanted_shape)}; give one value per target"
        )
        raise InvalidRequest(
            f"`{path}` has shape {list(shape)} but {wanted_by}",
            field=path,
            shape=list(shape),
            tokens=length,
        )
    return np.frombuffer(values, dtype).reshape(shape)


def _dtype_name(dtype: int) -> str:
    if dtype in types_pb2.TensorDtype.values():
        return str(types_pb2.TensorDtype.Name(types_pb2.TensorDtype.ValueType(dtype)))
    return str(dtype)

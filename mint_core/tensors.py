"""Tensors of requests, whichever form their values come in: protobuf in, checked arrays out."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mint_core.errors import InvalidRequest
from mintrpc.v1 import types_pb2

_UNSET, _FLOAT32, _INT64, _INT32 = (
    types_pb2.TENSOR_DTYPE_UNSPECIFIED,
    types_pb2.TENSOR_DTYPE_FLOAT32,
    types_pb2.TENSOR_DTYPE_INT64,
    types_pb2.TENSOR_DTYPE_INT32,
)
_LAYOUTS: Mapping[int, np.dtype[np.generic]] = {
    _FLOAT32: np.dtype("<f4"),
    _INT64: np.dtype("<i8"),
    _INT32: np.dtype("<i4"),
}


def read_floats(tensor: types_pb2.TensorData, path: str) -> NDArray[np.float32]:
    """Its values in the shape that it has. Raises InvalidRequest."""
    return _read(tensor, path, "float_values", (_FLOAT32,)).astype(np.float32, copy=False)


def read_integers(tensor: types_pb2.TensorData, path: str) -> NDArray[np.int64]:
    """Its values in the shape that it has. Raises InvalidRequest."""
    return _read(tensor, path, "int_values", (_INT64, _INT32)).astype(np.int64, copy=False)


def _read(
    tensor: types_pb2.TensorData, path: str, numbers: str, wanted: tuple[int, ...]
) -> NDArray[np.generic]:
    """`numbers`: the field that may hold them instead of bytes."""
    form = _form(tensor, path, numbers)
    if tensor.dtype not in wanted and (form == "values" or tensor.dtype != _UNSET):
        raise InvalidRequest(
            f"`{path}.dtype` is {_dtype_name(tensor.dtype)} but must be "
            f"{' or '.join(map(_dtype_name, wanted))}; convert the values",
            field=f"{path}.dtype",
            dtype=_dtype_name(tensor.dtype),
        )
    layout = _LAYOUTS[wanted[0] if form == numbers else tensor.dtype]
    given = getattr(tensor, form)
    item, unit = (layout.itemsize, "bytes") if form == "values" else (1, "values")
    count, rest = divmod(len(given), item)
    shape = tuple(tensor.shape) or (count,)
    # First the lengths: a product of many large ones is long in the making.
    if rest or min(shape) < 0 or max(shape) >= 2**31 or math.prod(shape) != count:
        raise InvalidRequest(
            f"`{path}.{form}` has {len(given)} {unit}, which is not "
            f"{f'{item} times ' if item > 1 else ''}the product of shape {list(shape)}; send every "
            "value once",
            field=f"{path}.{form}",
            size=len(given),
        )
    values = np.frombuffer(given, layout) if form == "values" else np.array(given, layout)
    return values.reshape(shape)


def _form(tensor: types_pb2.TensorData, path: str, numbers: str) -> str:
    """The field that holds the values."""
    forms = [name for name in ("values", "float_values", "int_values") if getattr(tensor, name)]
    if len(forms) > 1:
        raise InvalidRequest(
            f"`{path}` has values in `{forms[0]}` and in `{forms[1]}`; give them in one",
            field=f"{path}.{forms[1]}",
        )
    form = forms[0] if forms else "values"
    if form not in ("values", numbers):
        raise InvalidRequest(
            f"`{path}.{form}` is set but `{path}` takes `{numbers}`, or `values` as bytes",
            field=f"{path}.{form}",
        )
    return form


def _dtype_name(dtype: int) -> str:
    if dtype in types_pb2.TensorDtype.values():
        return str(types_pb2.TensorDtype.Name(types_pb2.TensorDtype.ValueType(dtype)))
    return str(dtype)

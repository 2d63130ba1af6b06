"""Dense arrays on their way to and from a server."""

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from mint.errors import InvalidInputError, refused
from mint.types._checks import array_of, integers_of
from mint.types._from_proto import known, words
from mintrpc.v1 import types_pb2

TensorDtype = Literal["float32", "int64"]


class TensorData:
    """An immutable array of float32 or int64, backed by numpy."""

    __slots__ = ("_array",)
    _array: NDArray[Any]

    def __init__(
        self,
        data: Any,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        """`data` is a list, numpy array or torch tensor. `dtype` left out is that of the data.

        With indices, `data` are the values that a matrix of `shape` holds in CSR form; it is kept
        dense, 0 where it has no value.
        """
        array = array_of(data, "data")
        array = cast(array, dtype, "data")
        shape = None if shape is None else integers_of(shape, "shape").ravel().tolist()
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            array = _dense(array, sparse_crow_indices, sparse_col_indices, shape)
        elif shape is not None:
            if int(np.prod(shape, dtype=np.int64)) != array.size:
                raise refused(
                    "shape", f"{list(shape)} does not fit the {array.size} entries of `data`"
                )
            array = array.reshape(tuple(shape))
        if array.ndim == 0:
            raise refused("data", "is a single number; give a list")
        array.flags.writeable = False
        self._array = array

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> "TensorData":
        """Floats become float32, integers int64."""
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: Any) -> "TensorData":
        """Floats become float32, integers int64."""
        return cls(tensor)

    @classmethod
    def from_torch_sparse(cls, tensor: Any) -> "TensorData":
        """As `from_torch`; it is kept dense."""
        return cls(tensor)

    @property
    def data(self) -> list[Any]:
        """All values in one flat list, in row-major order."""
        flat: list[Any] = self._array.ravel().tolist()
        return flat

    @property
    def dtype(self) -> TensorDtype:
        """The type on the wire."""
        return "float32" if self._array.dtype.kind == "f" else "int64"

    @property
    def shape(self) -> list[int]:
        """Lengths of its dimensions."""
        return list(self._array.shape)

    def tolist(self) -> list[Any]:
        """The values in lists nested as `shape` says."""
        nested: list[Any] = self._array.tolist()
        return nested

    def to_numpy(self) -> NDArray[Any]:
        """A copy as a numpy array."""
        return self._array.copy()

    def to_torch(self) -> Any:
        """A copy as a torch tensor. Needs torch."""
        from mint._torch import tensor_of

        return tensor_of(self._array)

    def to_proto(self) -> types_pb2.TensorData:
        array = self._array.astype(self._array.dtype.newbyteorder("<"), copy=False)
        dtype = words(types_pb2.TensorDtype)[self.dtype]
        return types_pb2.TensorData(dtype=dtype, shape=array.shape, values=array.tobytes())

    @classmethod
    def from_proto(cls, message: types_pb2.TensorData) -> Self:
        where = "the answer holds a tensor of dtype"
        dtype = np.dtype(known(types_pb2.TensorDtype, message.dtype, where)).newbyteorder("<")
        array = np.frombuffer(message.values, dtype)
        return cls(array.reshape(tuple(message.shape) or (-1,)))

    def __len__(self) -> int:
        return len(self._array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._array, dtype=dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(
            self._array, other._array, equal_nan=self.dtype == "float32"
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"TensorData(data={self.tolist()!r}, dtype={self.dtype!r}, shape={self.shape!r})"


def cast(array: NDArray[Any], dtype: str | None, field: str) -> NDArray[Any]:
    """A copy as `dtype`, or as what the data are. Floats do not become integers, and integers keep
    their value.
    """
    dtype = dtype or ("float32" if array.dtype.kind == "f" else "int64")
    if dtype not in get_args(TensorDtype):
        raise refused("dtype", f"is {dtype!r}; it must be 'float32' or 'int64'")
    if dtype == "float32":
        with np.errstate(over="ignore"):  # Inf is what it is then
            return array.astype(np.float32)
    return integers_of(array, field).copy()


def _dense(
    values: NDArray[Any],  # [stored]
    crow: Sequence[int] | None,  # [rows + 1]
    columns: Sequence[int] | None,  # [stored]
    shape: Sequence[int] | None,
) -> NDArray[Any]:
    """The matrix of a CSR form."""
    if crow is None or columns is None or shape is None or len(shape) != 2:
        raise InvalidInputError(
            "a CSR form needs `sparse_crow_indices`, `sparse_col_indices` and a `shape` of two "
            "dimensions",
            field="sparse_crow_indices",
        )
    counts = np.diff(integers_of(crow, "sparse_crow_indices"))
    places = integers_of(columns, "sparse_col_indices")
    wrong = len(counts) != shape[0] or (counts < 0).any() or counts.sum() != len(values)
    if wrong or len(places) != len(values) or ((places < 0) | (places >= shape[1])).any():
        raise InvalidInputError(
            f"the CSR indices do not fit `shape` {list(shape)} and {len(values)} values",
            field="sparse_crow_indices",
        )
    dense = np.zeros(tuple(shape), values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), places] = values
    return dense

"""How an adapter's numbers lie in a row of the bank, told without torch: a row can then be read
where no bank is, and a bank can tell rows that lie as its own from others.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mint_core.errors import InvalidRequest
from mint_core.lora.spec import AdapterArrays, AdapterSpec, lora_a_name, lora_b_name

Floats = NDArray[np.float32]


class Matrix(NamedTuple):
    """A part of a row that is read as a matrix. All in numbers, not in bytes."""

    offset: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int

    def of(self, row: Floats) -> Floats:
        """The matrix, as a view of [params]. Raises ValueError if it exceeds the row."""
        shape = self.rows, self.columns
        strides = row.itemsize * self.row_stride, row.itemsize * self.column_stride
        return np.ndarray(shape, row.dtype, row.data, row.itemsize * self.offset, strides)


@dataclass(frozen=True)
class RowLayout:
    """A and B, [stored rank, in] and [out, stored rank], of every module of a base model."""

    encoded: bytes  # JSON; equal where rows lie alike

    @classmethod
    def of(cls, size: int, modules: Mapping[str, tuple[Matrix, Matrix]]) -> "RowLayout":
        """Of rows [size]."""
        return cls(json.dumps({"size": size, "modules": modules}, sort_keys=True).encode())

    @property
    def size(self) -> int:
        """Numbers of a row."""
        return self._content[0]

    def matrices(self, row: Floats, spec: AdapterSpec) -> dict[str, Floats]:
        """An adapter's A and B by PEFT's names, padding left out, as views of [params]."""
        places = self._content[1]
        named = {}
        for module in spec.modules:
            if module not in places:
                raise no_such_layer(module)
            a, b = (matrix.of(row) for matrix in places[module])
            named[lora_a_name(module)] = a[: spec.rank]
            named[lora_b_name(module)] = b[:, : spec.rank]
        return named

    def row(self, spec: AdapterSpec, arrays: AdapterArrays) -> Floats:  # [params]
        """A row of an adapter's arrays, which must be of its modules and rank."""
        row = np.zeros(self.size, np.float32)
        for name, matrix in self.matrices(row, spec).items():
            array = arrays[name]
            if array.shape != matrix.shape:
                raise InvalidRequest(
                    f"`{name}` has shape {list(array.shape)} but its layer needs "
                    f"{list(matrix.shape)}",
                    tensor=name,
                )
            matrix[...] = array
        return row

    @cached_property
    def _content(self) -> tuple[int, Mapping[str, tuple[Matrix, Matrix]]]:
        content = json.loads(self.encoded)
        size: int = content["size"]
        return size, {n: (Matrix(*a), Matrix(*b)) for n, (a, b) in content["modules"].items()}


def no_such_layer(module: str) -> InvalidRequest:
    return InvalidRequest(
        f"the base model has no linear layer `{module}`; the adapter belongs to another model",
        module=module,
    )

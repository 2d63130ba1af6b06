"""Whatever users hold numbers in, as numpy arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mint.errors import refused


def array_of(values: Any, field: str) -> NDArray[Any]:
    """Numbers out of a list, numpy array or torch tensor; booleans, text, ragged lists refused."""
    # A torch tensor, found out without importing torch.
    if any(kind.__module__.partition(".")[0] == "torch" for kind in type(values).__mro__):
        from mint._torch import host_array_of

        values = host_array_of(values)
    try:
        array = np.asarray(values)
    except ValueError:
        raise refused(field, "is ragged; give every row the same length") from None
    if array.size == 0:
        return array
    if array.dtype.kind not in "iuf":
        raise refused(field, f"holds {_kind_name(array)}; give integers or floats")
    return array


def integers_of(values: Any, field: str) -> NDArray[np.int64]:
    """As `array_of`, whole numbers only, as int64."""
    array = array_of(values, field)
    if array.size and array.dtype.kind == "f":
        raise refused(field, "holds floats; give integers")
    return array.astype(np.int64, copy=False)


def _kind_name(array: NDArray[Any]) -> str:
    names = {"b": "booleans", "U": "text", "S": "bytes", "O": "objects", "c": "complex numbers"}
    return names.get(array.dtype.kind, f"values of type {array.dtype}")

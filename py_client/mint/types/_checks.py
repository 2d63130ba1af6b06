"""Values and numbers that users give, as the contract's fields take them, or refused."""

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from mint.errors import refused
from mint.types._from_proto import words

T = TypeVar("T")
USE_FROM_INTS = "for token ids use ModelInput.from_ints"


def instance(value: Any, kind: type[T], field: str, remedy: str) -> T:
    """A value of that type."""
    if not isinstance(value, kind):
        raise refused(field, f"is a {type(value).__name__}; {remedy}")
    return value


def choice(enum: Any, value: Any, field: str, remedy: str) -> Any:
    """The value of an enum that a word stands for."""
    options = words(enum)
    if value not in options:
        raise refused(field, f"is {value!r}; {remedy}")
    return options[value]


def number(value: Any, field: str) -> float:
    """A real number; text and booleans are refused."""
    value = _item(value, field)
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise refused(field, f"is {value!r}; give a number")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise refused(field, f"is beyond {sys.float_info.max}")
    return float(value)


def text(value: Any, field: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise refused(field, f"is {value!r}; give a text")
    return value


def text_map(entries: Mapping[str, str] | None, field: str) -> dict[str, str]:
    """Texts by name; None means none."""
    return {
        text(name, field): text(value, f"{field}.{name}") for name, value in (entries or {}).items()
    }


def integer(value: Any, field: str, *, bits: int = 32) -> int:
    """A whole number that fits the contract's field."""
    value = _item(value, field)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise refused(field, f"is {value!r}; give a whole number")
    whole = int(value)
    if not -(2 ** (bits - 1)) <= whole < 2 ** (bits - 1):
        raise refused(field, f"is {whole}, beyond {bits} bits")
    return whole


def ttl(seconds: float | None, field: str = "ttl_seconds") -> Duration | None:
    """How long something is kept; None: until it is deleted."""
    if seconds is None:
        return None
    if not 0 < number(seconds, field) < float("inf"):
        raise refused(field, f"is {seconds}; give a positive number, or None to keep it")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def array_of(values: Any, field: str) -> NDArray[Any]:
    """Numbers out of a numpy array or torch tensor, or a list of them or of numbers; booleans,
    text, ragged lists refused.
    """
    try:
        try:
            array = np.asarray(values)
        except (TypeError, RuntimeError):  # of torch, and of a kind that numpy cannot read
            array = np.asarray(_on_host(values))
    except ValueError:
        raise refused(field, "is ragged; give every row the same length") from None
    except (TypeError, RuntimeError) as error:
        raise refused(field, f"cannot be read: {error}") from None
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
    whole = array.astype(np.int64, copy=False)
    if array.dtype.kind == "u" and (whole < 0).any():
        raise refused(field, f"holds {array.max()}, beyond 64 bits")
    return whole


def _on_host(values: Any) -> Any:
    """With numpy arrays in place of torch's tensors, also of those in lists."""
    if isinstance(values, list | tuple):
        return [_on_host(value) for value in values]
    # Found out without importing torch.
    if any(kind.__module__.partition(".")[0] == "torch" for kind in type(values).__mro__):
        from mint._torch import host_array_of

        return host_array_of(values)
    return values


def _item(value: Any, field: str) -> Any:
    """What a tensor or array of one entry holds; anything else as it is."""
    if not hasattr(value, "item"):
        return value
    array = array_of(value, field)
    if array.size != 1:
        raise refused(field, f"holds {array.size} numbers; give one")
    return array.item()


def _kind_name(array: NDArray[Any]) -> str:
    names = {"b": "booleans", "U": "text", "S": "bytes", "O": "objects", "c": "complex numbers"}
    return names.get(array.dtype.kind, f"values of type {array.dtype}")

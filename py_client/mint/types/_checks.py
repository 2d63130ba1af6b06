"""Values and numbers that users give, as the contract's fields take them, or refused."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from mint.errors import refused
from mint.types._from_proto import words

T = TypeVar("T")
_TOKENIZERS_KEY = "input_ids"
USE_FROM_INTS = "for token ids use ModelInput.from_ints"


def instance(value: Any, kind: type[T], field: str, remedy: str) -> T:
    """A value of that type."""
    if not isinstance(value, kind):
        raise refused(field, f"is {_type_name(value)}; {remedy}")
    return value


def choice(enum: Any, value: Any, field: str, remedy: str) -> Any:
    """The value of an enum that a word stands for."""
    options = words(enum)
    if not isinstance(value, str) or value not in options:
        raise refused(field, f"is {value!r}; {remedy}")
    return options[value]


def switch(value: Any, field: str) -> bool:
    """True or false, and nothing that Python takes for one of them."""
    if not isinstance(value, bool | np.bool_):
        raise refused(field, f"is {value!r}; give True or False")
    return bool(value)


def mapping(value: Any, field: str) -> dict[Any, Any]:
    """What a mapping holds; None: nothing."""
    if value is not None and not isinstance(value, Mapping):
        raise refused(field, f"is {_type_name(value)}; give a dict")
    return dict(value or {})


def listed(values: Any, field: str, of: str) -> list[Any]:
    """The entries of anything that can be gone through but texts and mappings."""
    try:
        entries = None if isinstance(values, str | bytes | Mapping) else iter(values)
    except TypeError:
        entries = None
    if entries is None:
        raise refused(field, f"is {_type_name(values)}; give a list of {of}")
    return list(entries)


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
        text(name, field): text(value, f"{field}.{name}")
        for name, value in mapping(entries, field).items()
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


def ttl(seconds: float | None) -> Duration | None:
    """How long something is kept; None: until it is deleted."""
    if seconds is None:
        return None
    if not 0 < number(seconds, "ttl_seconds") < float("inf"):
        raise refused("ttl_seconds", f"is {seconds}; give a positive number, or None to keep it")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def array_of(values: Any, field: str) -> NDArray[Any]:
    """Numbers out of a numpy array or torch tensor, or a list or iterator of them or of numbers;
    booleans, text, mappings, ragged lists refused.
    """
    if isinstance(values, Mapping):
        raise refused(field, f"is {_type_name(values)}; give a list")
    if isinstance(values, Iterator):
        values = list(values)
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
        raise refused(field, _wrong_kind(values, array))
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


def ids_in(values: Any) -> Any:
    """The token ids in what a tokenizer gives, which may be a mapping; anything else as it is."""
    return values.get(_TOKENIZERS_KEY, values) if isinstance(values, Mapping) else values


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


def _type_name(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _wrong_kind(values: Any, array: NDArray[Any]) -> str:
    """What is wrong with values that are no numbers, and what to give."""
    if array.ndim == 0 and array.dtype.kind in "OUS":
        return f"is {_type_name(values)}; give a list"
    if _TOKENIZERS_KEY in array.ravel().tolist():
        return f"holds a tokenizer's keys; give what it has under {_TOKENIZERS_KEY!r}"
    names = {"b": "booleans", "U": "text", "S": "bytes", "O": "objects", "c": "complex numbers"}
    kind = names.get(array.dtype.kind, f"values of type {array.dtype}")
    return f"holds {kind}; give integers or floats"

"""What checkpoints say of the float8 weights that they hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mint_core.errors import FailedPrecondition
from mint_core.lora.float8 import Float8Matrix

_FINE_GRAINED, _COMPRESSED = "fp8", "compressed-tensors"
# Options of either kind that are followed, or of what is computed otherwise here: activations are
# never rounded. Any other that is set is refused.
_KNOWN = {
    _FINE_GRAINED: {
        *("fmt", "weight_block_size", "scale_fmt"),
        *("activation_scheme", "modules_to_not_convert", "ignored_layers"),
    },
    _COMPRESSED: {
        *("config_groups", "format", "quantization_status"),
        *("ignore", "version", "global_compression_ratio"),
    },
}
_KNOWN_OF_WEIGHTS = {
    *("type", "num_bits", "strategy", "block_structure", "symmetric"),
    *("observer", "observer_kwargs"),  # how its maker came to the scales
}
_READ = {
    "type": ("float",),
    "num_bits": (8,),
    "symmetric": (True,),
    "strategy": ("channel", "tensor", "block"),
}
_UNKNOWN = "which is not known"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the scales of weights lie."""

    scales: str  # what is beside `weight`
    # Channels and inputs that a scale is for; None: each channel has one, or all have the same.
    block: tuple[int, int] | None = None

    def matrix(self, numbers: Tensor, scales: Tensor) -> Float8Matrix:
        """Of a weight [out, in]. Raises ValueError."""
        out, inner = numbers.shape
        rows, columns = self.block or (out if scales.numel() == 1 else 1, inner)
        shape = -(-out // rows), -(-inner // columns)
        if scales.numel() != shape[0] * shape[1] or not scales.is_floating_point():
            kind = str(scales.dtype).removeprefix("torch.")
            raise ValueError(
                f"{list(scales.shape)} `{self.scales}` of {kind} for a weight {[out, inner]}, "
                f"where {list(shape)} numbers are wanted"
            )
        own = scales.float().view(shape).repeat_interleave(rows, dim=0)[:out]
        return Float8Matrix(numbers, own.contiguous())


def stored(config: Any) -> Stored | None:
    """Of a model's configuration; None where its weights are not quantized. Raises
    FailedPrecondition, naming what is not read here.
    """
    said = _said(config)
    if said is None:
        return None
    method = said.get("quant_method")
    if method not in _KNOWN:
        raise _refused("quant_method", method, f"and {_FINE_GRAINED} and {_COMPRESSED} are read")
    found = {name: value for name, value in said.items() if name != "quant_method"}
    if unknown := sorted(name for name in found.keys() - _KNOWN[method] if _is_set(found[name])):
        raise _refused(unknown[0], found[unknown[0]], _UNKNOWN)
    return _fine_grained(found) if method == _FINE_GRAINED else _compressed(found)


def is_fine_grained(config: Any) -> bool:
    return (_said(config) or {}).get("quant_method") == _FINE_GRAINED


def _said(config: Any) -> Mapping[str, Any] | None:
    for part in (config, config.get_text_config()):
        said = getattr(part, "quantization_config", None)
        if said:
            return dict(said)
    return None


def forget(config: Any) -> None:
    """Takes out what the configuration says of quantized weights."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _fine_grained(said: Mapping[str, Any]) -> Stored:
    if said.get("fmt", "e4m3") != "e4m3":
        raise _refused("fmt", said["fmt"], "and e4m3 is read")
    return Stored("weight_scale_inv", _block(said.get("weight_block_size"), "weight_block_size"))


def _compressed(said: Mapping[str, Any]) -> Stored:
    kinds = set()
    for name, group in dict(said.get("config_groups") or {}).items():
        place = f"config_groups.{name}"
        for where in (said, group):
            if where.get("format") not in (None, "float-quantized"):
                raise _refused("format", where["format"], "and float-quantized is read")
        weights = dict(group.get("weights") or {})
        if unknown := sorted(n for n in weights.keys() - _KNOWN_OF_WEIGHTS if _is_set(weights[n])):
            raise _refused(f"{place}.weights.{unknown[0]}", weights[unknown[0]], _UNKNOWN)
        for option, wanted in _READ.items():
            if (value := weights.get(option)) not in wanted:
                are = " or ".join(map(str, wanted))
                raise _refused(f"{place}.weights.{option}", value, f"and {are} is read")
        sizes = weights.get("block_structure") if weights["strategy"] == "block" else None
        kinds.add(_block(sizes, f"{place}.weights.block_structure"))
    if len(kinds) != 1:
        raise _refused("config_groups", f"{len(kinds)} kinds of weights", "and one is read")
    return Stored("weight_scale", kinds.pop())


def _block(sizes: Any, name: str) -> tuple[int, int] | None:
    if sizes is None:
        return None
    whole = isinstance(sizes, list | tuple) and all(type(s) is int and s > 0 for s in sizes)
    if not whole or len(sizes) != 2 or sizes[1] & (sizes[1] - 1):
        raise _refused(name, sizes, "and two numbers are read, the second a power of two")
    return sizes[0], sizes[1]


def _is_set(value: Any) -> bool:
    return bool(value) and value != {"format": "dense"}  # of weights that are not sparse


def _refused(name: str, value: Any, instead: str) -> FailedPrecondition:
    return FailedPrecondition(
        "the base model's weights are quantized in a way that --dtype float8 does not read: its "
        f"`quantization_config` has `{name}` {value!r}, {instead}; give another dtype, or the "
        "model as it was before, of which float8 weights are then made here"
    )

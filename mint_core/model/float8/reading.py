"""Has transformers read a model with float8 weights in the linear layers of its body: those that a
checkpoint holds, as they lie in it, or made of each weight as it comes. Head, embeddings, norms and
biases stay as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mint_core.lora.float8 import NUMBERS, Float8Matrix, make_float8, quantized
from mint_core.model import architecture
from mint_core.model.float8.stored import Stored, forget, stored
from mint_core.model.routing import routed_layers

SAMPLED_VALUES = 65_536  # of a tensor, for the fingerprint
_NAME = "mint_float8"  # in transformers' registry
_WEIGHT = ".weight"
# Beside weights in some checkpoints. Activations are not rounded here, so they mean nothing.
_OF_ACTIVATIONS = ("activation_scale", "input_scale")


class Float8(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is read, and what reading it shows."""

    quant_method = _NAME

    def __init__(self, *, kept: bool) -> None:
        """Kept: layers hold the numbers. Otherwise what they stand for, in the type that the model
        computes in, and are like any others.
        """
        self.kept = kept
        self.stored: Stored | None = None  # None: numbers are made here
        self.samples: dict[str, bytes] = {}  # by weight, of what it was before it was numbers
        self.fault = ""  # why it cannot be read

    def begin(self, config: Any) -> None:
        """Takes over what the model's configuration says of its weights. Raises
        FailedPrecondition.
        """
        self.stored = stored(config)
        forget(config)

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _NAME}


def sample(values: Tensor) -> bytes:
    """Evenly spaced values, rounded to bfloat16."""
    flat = values.detach().reshape(-1)
    chosen = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].to(torch.bfloat16)
    return chosen.view(torch.int16).cpu().numpy().tobytes()


class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it reads."""

    quantization_config: Float8

    def __init__(self, quantization_config: Float8, **_: Any) -> None:
        is_stored = quantization_config.stored is not None
        super().__init__(quantization_config, pre_quantized=is_stored)
        self._linears: set[str] = set()

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        if routed_layers(model):
            raise architecture.unsupported(
                model, "its experts' weights cannot be float8 yet; give --dtype bfloat16"
            )
        body = set(model.get_decoder().modules())
        self._linears = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module in body
        }

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Leaves a model as if it had been read without us."""
        forget(model.config)
        del model.hf_quantizer
        del model.quantization_method
        model.is_quantized = False
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            each for each in conversions if not any(isinstance(o, _Read) for o in _operations(each))
        ]

    @property
    def quantized_element_size(self) -> float | None:
        return 1 if self.quantization_config.kept else None

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name.endswith(_WEIGHT) and param_name.removesuffix(_WEIGHT) in self._linears

    def get_quantize_ops(self) -> ConversionOps:
        return _Make(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        how = self.quantization_config.stored
        if how is None:
            return []
        sources = ["weight", how.scales, *_OF_ACTIVATIONS]
        return [WeightConverter(sources, "weight", [_Read(self, how)])]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def placed(self, model: Any, name: str, weight: Tensor | None, made: Float8Matrix) -> Tensor:
        """What goes to the place of a weight. `weight`: what it was, if it was no numbers."""
        how = self.quantization_config
        linear: nn.Linear = model.get_submodule(name.removesuffix(_WEIGHT))
        if made.numbers.shape != linear.weight.shape:
            raise ValueError(f"{name} is {list(made.numbers.shape)} and not its layer's size")
        how.samples[name] = sample(made.weight(torch.float32) if weight is None else weight)
        if not (how.kept and self.param_needs_quantization(model, name)):
            return made.weight(linear.weight.dtype)
        make_float8(linear, made.scales)
        return nn.Parameter(made.numbers, requires_grad=False)


class _Make(ConversionOps):  # type: ignore[misc]
    """Numbers of weights."""

    def __init__(self, quantizer: _Quantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        found = {name: _only(value) for name, value in input_dict.items()}
        return {
            name: self.hf_quantizer.placed(model, name, weight, quantized(weight))
            if self.hf_quantizer.param_needs_quantization(model, name)
            else weight
            for name, weight in found.items()
        }


class _Read(ConversionOps):  # type: ignore[misc]
    """A weight of a checkpoint, with its scales if it is numbers."""

    def __init__(self, quantizer: _Quantizer, stored: Stored) -> None:
        self._stored = stored
        self.hf_quantizer = quantizer  # its name tells transformers that it takes any type

    def __deepcopy__(self, _: Any) -> "_Read":
        return self  # transformers has a copy for each weight

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        how = self.hf_quantizer.quantization_config
        found = {name: _only(value) for name, value in input_dict.items()}
        weight, scales = found.get("weight"), found.get(self._stored.scales)
        try:
            if weight is None or (weight.dtype == NUMBERS) != (scales is not None):
                raise ValueError(f"`weight` and `{self._stored.scales}` go together in float8")
            if scales is None:
                return {full_layer_name: weight.to(model.get_parameter(full_layer_name).dtype)}
            made = self._stored.matrix(weight, scales)
            placed = self.hf_quantizer.placed(model, full_layer_name, None, made)
        except (ValueError, AttributeError) as error:
            how.fault = how.fault or f"{full_layer_name}: {error}"
            raise
        return {full_layer_name: placed}


def _only(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", None) or []


AUTO_QUANTIZER_MAPPING[_NAME] = _Quantizer  # anew where this module is

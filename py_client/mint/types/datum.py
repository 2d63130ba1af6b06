"""One training sequence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mint.errors import refused
from mint.types._checks import USE_FROM_INTS, array_of, ids_in, instance, integers_of, mapping
from mint.types.model_input import ModelInput, message_fields
from mint.types.tensor_data import TensorData, cast
from mintrpc.v1 import types_pb2

# Inputs whose element type does not depend on how they were written: weights of [0, 1] are floats.
_DTYPES = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}
_ROUTERS_CHOICE = 65535  # on the wire


@dataclass(frozen=True, slots=True, init=False)
class Datum:
    """What the model reads, and by name what the loss reads.

    Entry i of each input belongs to the prediction made after token i of `model_input`. Inputs may
    be given as lists, numpy arrays or torch tensors; they read back as `TensorData`.

    `routed_experts` says to which experts the tokens go, of a base model that has experts: what a
    sampler told, as bytes, or numbers [tokens, layers, experts of a token], -1 where the router
    chooses.
    """

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]
    routed_experts: bytes

    def __init__(
        self,
        model_input: ModelInput,
        loss_fn_inputs: Mapping[str, Any] | None = None,
        *,
        routed_experts: Any = b"",
    ) -> None:
        model_input = instance(model_input, ModelInput, "model_input", USE_FROM_INTS)
        object.__setattr__(self, "model_input", model_input)
        inputs = mapping(loss_fn_inputs, "loss_fn_inputs")
        tensors = {name: _tensor(name, value) for name, value in inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", tensors)
        object.__setattr__(self, "routed_experts", _routed_experts(routed_experts))

    def to_proto(self) -> types_pb2.Datum:
        tokens: Any = message_fields(self.model_input)
        tensors = {name: value.to_proto() for name, value in self.loss_fn_inputs.items()}
        return types_pb2.Datum(
            model_input=tokens, loss_fn_inputs=tensors, routed_experts=self.routed_experts
        )


def _routed_experts(value: Any) -> bytes:
    """Numbers of experts, 2 bytes each."""
    if isinstance(value, bytes):
        return value
    ids = integers_of(value, "routed_experts")
    ids = np.where(ids == -1, _ROUTERS_CHOICE, ids)
    if len(wrong := ids[(ids < 0) | (ids > _ROUTERS_CHOICE)]):
        raise refused(
            "routed_experts", f"holds {wrong[0]}; give numbers of experts, -1 for the router's own"
        )
    return ids.astype("<u2").tobytes()


def _tensor(name: str, value: Any) -> TensorData:
    field = f"loss_fn_inputs.{name}"
    given = array_of(ids_in(value) if name == "target_tokens" else value, field)
    if given.ndim == 0:
        raise refused(field, f"is {given.item()!r}; give a list, one entry for each target")
    array = cast(given, _DTYPES.get(name), field)
    if not np.isfinite(array).all():
        index = int(np.argmin(np.isfinite(array)))
        raise refused(
            field, f"holds {given.ravel()[index]} at {index}; every entry must be finite in float32"
        )
    return TensorData(array)

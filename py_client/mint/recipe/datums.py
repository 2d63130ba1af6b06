"""Datums for cross-entropy out of rendered conversations."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mint.errors import refused
from mint.recipe.renderers import Message, TrainOnWhat
from mint.types import Datum, ModelInput
from mint.types._checks import array_of, integer
from mint.types.tensor_data import cast

Reduction = Literal["sum", "mean"]


class SupervisedRenderer(Protocol):
    def build_supervised_example(
        self, messages: Sequence[Message], train_on_what: TrainOnWhat
    ) -> tuple[ModelInput, NDArray[np.float32]]: ...


def datum_from_model_input_weights(
    model_input: ModelInput,
    weights: ArrayLike,  # [tokens], the weight of each token as a target
    max_length: int | None = None,
    reduction: Reduction = "sum",
) -> Datum:
    """Cuts to the first `max_length` tokens, then shifts: a token is the target of the one before.

    `reduction="mean"` divides the weights by their sum, so that the loss is a mean over the trained
    tokens; weights that are all 0 stay so.
    """
    tokens = model_input.to_ints()
    array = cast(array_of(weights, "weights"), "float32", "weights")
    _check(len(tokens), array, max_length, reduction)
    tokens, array = tokens[:max_length], array[:max_length]
    shifted = array[1:]
    total = float(shifted.sum(dtype=np.float64))
    if reduction == "mean" and total != 0.0:
        shifted = (shifted / total).astype(np.float32)
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.asarray(tokens[1:]), "weights": shifted},
    )


def conversation_to_datum(
    conversation: Sequence[Message],
    renderer: SupervisedRenderer,
    max_length: int | None = None,
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    reduction: Reduction = "mean",
) -> Datum:
    """Renders and shifts in one step.

    Its defaults differ from those of the two steps it does, as recipes rely on: all assistant
    messages are trained, and their weights sum to 1.
    """
    model_input, weights = renderer.build_supervised_example(
        conversation, train_on_what=train_on_what
    )
    return datum_from_model_input_weights(model_input, weights, max_length, reduction)


def _check(
    num_tokens: int, weights: NDArray[np.float32], max_length: int | None, reduction: str
) -> None:
    if weights.shape != (num_tokens,):
        raise refused(
            "weights",
            f"has shape {list(weights.shape)} but `model_input` has {num_tokens} tokens; "
            "give one weight per token",
        )
    if not np.isfinite(weights).all():
        raise refused("weights", "holds NaN or Inf; give finite weights")
    if max_length is not None and integer(max_length, "max_length") < 2:
        raise refused("max_length", f"is {max_length}; a token and its target need at least 2")
    if num_tokens < 2:
        raise refused(
            "model_input", f"has {num_tokens} tokens; a token and its target need at least 2"
        )
    if reduction not in ("sum", "mean"):
        raise refused("reduction", f"is {reduction!r}; it must be 'sum' or 'mean'")

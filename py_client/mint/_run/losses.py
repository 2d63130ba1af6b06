"""Losses by name, with their options, as the contract's own messages."""

from collections.abc import Mapping
from dataclasses import dataclass

from mint.errors import InvalidInputError, refused
from mint.types._checks import number
from mintrpc.v1 import trainer_pb2


@dataclass(frozen=True, slots=True)
class _Loss:
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


_CLIPPED = _Loss(options=("clip_low_threshold", "clip_high_threshold"))
_LOSSES = {
    "cross_entropy": _Loss(),
    "importance_sampling": _Loss(),
    "ppo": _CLIPPED,
    "cispo": _CLIPPED,
    "dro": _Loss(options=("beta",), required=("beta",)),
    "gspo": _CLIPPED,
}


def set_loss(
    request: trainer_pb2.ForwardRequest | trainer_pb2.ForwardBackwardRequest,
    loss_fn: str,
    loss_fn_config: Mapping[str, float] | None,
) -> None:
    """Writes the loss into a request. Unknown names and options are refused."""
    if loss_fn not in _LOSSES:
        raise refused("loss_fn", f"is {loss_fn!r}; it must be one of {', '.join(_LOSSES)}")
    loss, config = _LOSSES[loss_fn], dict(loss_fn_config or {})
    for name in config:
        if name not in loss.options:
            raise InvalidInputError(
                f"`loss_fn_config` has `{name}`, but {loss_fn} takes "
                f"{', '.join(loss.options) or 'no options'}",
                field=f"loss_fn_config.{name}",
            )
    for name in loss.required:
        if name not in config:
            raise refused("loss_fn_config", f"lacks `{name}`, which {loss_fn} needs")
    message = getattr(request, loss_fn)
    message.SetInParent()
    for name, value in config.items():
        setattr(message, name, number(value, f"loss_fn_config.{name}"))

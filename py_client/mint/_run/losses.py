"""Losses by name, with their options, as the contract's own messages."""

from collections.abc import Mapping

from mint.errors import InvalidInputError, refused
from mint.types._checks import number
from mintrpc.v1 import trainer_pb2

_REQUIRED = ("beta",)  # options without a default


def set_loss(
    request: trainer_pb2.ForwardRequest | trainer_pb2.ForwardBackwardRequest,
    loss_fn: str,
    loss_fn_config: Mapping[str, float] | None,
) -> None:
    """Writes the loss into a request. Unknown names and options are refused."""
    losses = [field.name for field in request.DESCRIPTOR.oneofs_by_name["loss_fn"].fields]
    if loss_fn not in losses:
        raise refused("loss_fn", f"is {loss_fn!r}; it must be one of {', '.join(losses)}")
    message, config = getattr(request, loss_fn), dict(loss_fn_config or {})
    options = [field.name for field in message.DESCRIPTOR.fields]
    for name in config:
        if name not in options:
            raise InvalidInputError(
                f"`loss_fn_config` has `{name}`, but {loss_fn} takes "
                f"{', '.join(options) or 'no options'}",
                field=f"loss_fn_config.{name}",
            )
    for name in options:
        if name in _REQUIRED and name not in config:
            raise refused("loss_fn_config", f"lacks `{name}`, which {loss_fn} needs")
    message.SetInParent()
    for name, value in config.items():
        setattr(message, name, number(value, f"loss_fn_config.{name}"))

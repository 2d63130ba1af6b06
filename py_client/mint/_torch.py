"""Tensors of torch, in and out, and losses written in it. Imported only once torch is asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mint.errors import InvalidInputError

Floats = NDArray[np.float32]


def host_array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's values in host memory; half precision is widened to float32."""
    tensor = tensor.detach().cpu()
    if tensor.is_sparse or tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_floating_point():
        tensor = tensor.float()
    return np.asarray(tensor.numpy())


def tensor_of(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of its own over a copy of `array`."""
    return torch.from_numpy(array.copy())


def differentiate(
    loss_fn: Callable[[Any, list[torch.Tensor]], Any],
    data: Sequence[Any],
    logprobs: Sequence[Floats],  # per datum, [n] or [n, k]
) -> tuple[float, dict[str, float], list[Floats]]:
    """A loss, its metrics, and its derivative with respect to each logprob; 0 where the loss does
    not depend on it.
    """
    leaves = [tensor_of(array).requires_grad_() for array in logprobs]
    with torch.enable_grad():
        loss, metrics = _checked(loss_fn(list(data), list(leaves)))
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    arrays = [
        np.zeros_like(array) if slope is None else np.asarray(host_array_of(slope), np.float32)
        for slope, array in zip(slopes, logprobs, strict=True)
    ]
    return loss.detach().item(), metrics, arrays


def _checked(answer: Any) -> tuple[torch.Tensor, dict[str, float]]:
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
        raise _refusal(f"returned a {type(answer).__name__}; return (loss, metrics)")
    loss, metrics = answer
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        what = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise _refusal(f"returned a loss of {what}; return a tensor with one value")
    if not loss.requires_grad:
        raise _refusal("returned a loss that does not depend on the logprobs by torch operations")
    try:
        return loss.reshape(()), {str(name): _number(value) for name, value in metrics.items()}
    except (TypeError, ValueError):
        raise _refusal(f"returned the metrics {metrics!r}; return numbers by name") from None


def _number(value: Any) -> float:
    value = value.detach() if isinstance(value, torch.Tensor) else value
    return value if isinstance(value, int | float) else float(value)


def _refusal(what: str) -> InvalidInputError:
    return InvalidInputError(f"the custom loss {what}", field="loss_fn")

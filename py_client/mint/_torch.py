"""Tensors of torch, in and out. Imported only once a torch tensor is met or asked for."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's values in host memory; half precision is widened to float32."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
    return np.asarray(tensor.numpy())


def tensor_of(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of its own over a copy of `array`."""
    return torch.from_numpy(array.copy())

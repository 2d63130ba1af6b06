"""Zeros that take memory when they are first written."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def fresh_zeros(
    sizes: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, mmap.mmap | None]:
    """On a CPU in anonymous pages, returned with it: torch's own zeros may be written as such, all
    at once.
    """
    if device.type != "cpu":
        return torch.zeros(*sizes, dtype=dtype, device=device), None
    pages = mmap.mmap(
        -1, math.prod(sizes) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    return torch.frombuffer(pages, dtype=dtype).view(*sizes), pages

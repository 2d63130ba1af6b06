"""Functions of single numbers, with the same bits wherever a number stands."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

WHOLE_VECTORS = 64  # numbers that a CPU computes at a time, at most


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # [T, width]
    """A function of single numbers, each row in whole vectors: a CPU computes what is left over of
    a tensor by other code, with other last bits, and a row's place must not show.
    """
    missing = -x.shape[1] % WHOLE_VECTORS
    if not missing:
        return function(x)
    return function(functional.pad(x, (0, missing)))[:, : x.shape[1]]

"""Linear layers whose weights oneDNN has packed, for passes of few rows without backward.

MKL computes a product of one row, or of two, by other kernels than one of many, with other last
bits. oneDNN computes a row alike however many there are, and few rows faster.
"""

import torch
from torch import Tensor

TRIED_ROWS = (1, 2, 3, 4, 7, 16, 33)
_ROWS = 64
_PACKED_FOR = 8  # rows; packing for a single one makes slower kernels


class PackedLinear:
    """x W^T + b. Holds a copy of the weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.in_features = weight.shape[1]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self._weight, self._bias, "none", [], ""
        )
        return y

    def computes_rows_alike(self) -> bool:
        """Whether rows are the same, bit for bit, with whatever number of others."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_ROWS, self.in_features, generator=generator)
        whole = self(x)
        return all(
            torch.equal(self(x[start : start + rows]), whole[start : start + rows])
            for rows in TRIED_ROWS
            for start in (0, 5, _ROWS - rows)
        )


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a oneDNN for this kind of weights."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )

"""Frozen linear layers whose weights oneDNN has packed, for passes without backward: few rows are
computed faster so, and each row the same, bit for bit, with whatever number of others.

A library chooses its kernel by the number of rows, and some kernels add up in another order than
the rest. So no other numbers of rows are computed than a few, of which each is tried once for each
shape: fewer rows are filled up to the next that gives the same row, more than the largest are cut.
With AVX-512 oneDNN computes a single row of more than 1,024 numbers otherwise than two or more
(torch 2.13, 2026-11-30).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mint_core.lora.segments import MIN_ROWS

# Where rows cost, and not weights alone, a product is filled up by a fourth at most; cut into parts
# of the last it is as fast as whole.
SIZES = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_TYPICAL = 8  # rows that the weights are packed for, and that give what others must


class PackedLinear:
    """x W^T + b. Holds a copy of the weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:  # [out, in], [out]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL)
        self._bias = bias
        self.sizes: Sizes | None = None  # in which it is computed; None: in any

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the weights begin and end in memory."""
        start = torch.ops.mkldnn.data_ptr(self._weight)
        return start, start + torch.ops.mkldnn._nbytes(self._weight)

    def __call__(self, x: Tensor) -> Tensor:  # [n, in] -> [n, out]
        rows = x.shape[0]
        size = self.sizes.of(rows) if self.sizes else rows
        if size == rows:
            return self.product(x)
        if size < rows:
            return torch.cat([self(part) for part in x.split(size)])
        return self.product(functional.pad(x, (0, 0, 0, size - rows)))[:rows]

    def product(self, x: Tensor) -> Tensor:
        """All rows in one call, whose bits may depend on how many they are."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self._weight, self._bias, "none", [], ""
        )
        return y


class Sizes:
    """Numbers of rows in which layers of one shape give one and the same row: tried with one of
    them, each when it is first asked for.
    """

    def __init__(self, layer: PackedLinear, width: int, dtype: torch.dtype) -> None:
        self._layer = layer
        self._row = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        self._expected = self._computed(_TYPICAL)[0]
        self._alike: dict[int, bool] = {}
        self._of: dict[int, int] = {}

    def alike(self, size: int) -> bool:
        """Whether so many rows are each what they are among the typical number."""
        if size not in self._alike:
            self._alike[size] = all(
                torch.equal(row, self._expected) for row in self._computed(size)
            )
        return self._alike[size]

    def of(self, rows: int) -> int:
        """The least size that holds them, or else the largest. Any at all if none gives one row:
        then the layer must not be used.
        """
        if rows not in self._of:
            larger = (size for size in SIZES if size >= rows and self.alike(size))
            smaller = (size for size in reversed(SIZES) if size < rows and self.alike(size))
            self._of[rows] = next(larger, 0) or next(smaller, rows)
        return self._of[rows]

    def _computed(self, size: int) -> Tensor:  # [size, out], of one row
        return self._layer.product(self._row.repeat(size, 1))


class Packing:
    """Packs the weights of one model. `exact`: those alone of which a row can be had that is the
    same with whatever number of others.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._sizes: dict[tuple[int, int, bool], Sizes] = {}  # by out, in and whether with a bias
        self.packed: list[PackedLinear] = []

    def layers(self, weights: Sequence[Tensor], bias: Tensor | None = None) -> list[PackedLinear]:
        """Layers of one shape, each [out, in]; none where a row would be filled up too far."""
        first = PackedLinear(weights[0], bias)
        sizes = None
        if self._exact:
            out, width = weights[0].shape
            shape = out, width, bias is not None
            if shape not in self._sizes:
                self._sizes[shape] = Sizes(first, width, weights[0].dtype)
            sizes = self._sizes[shape]
            if not _serves(sizes):
                return []
        layers = [first, *(PackedLinear(weight, bias) for weight in weights[1:])]
        for layer in layers:
            layer.sizes = sizes
        self.packed += layers
        return layers

    def __str__(self) -> str:
        if not self._exact:
            return "all, rows computed as they come"
        return ", ".join(f"{out}x{width} {_told(s)}" for (out, width, _), s in self._sizes.items())


def _serves(sizes: Sizes) -> bool:
    return sizes.alike(_TYPICAL) and sizes.of(1) <= MIN_ROWS


def _told(sizes: Sizes) -> str:
    if not _serves(sizes):
        return "not, as its rows depend on each other"
    few = [rows for rows in range(1, _TYPICAL) if sizes.of(rows) != rows]
    return f"filled up where rows are {', '.join(map(str, few))}" if few else "as it is"


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a oneDNN for this kind of weights."""
    if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()

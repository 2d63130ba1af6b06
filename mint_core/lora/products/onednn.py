"""Products by oneDNN of float32 matrices that lie as torch has them.

MKL uses AVX-512 on Intel's processors alone: on one core of an AMD EPYC that has it, products of
128 rows with 576 x 1,536 come at 115 GFLOP/s by MKL and at 245 to 260 by oneDNN (torch 2.13,
2026-11-30). On Intel's, and with AVX2, both are alike, and small matrices are faster by MKL.

oneDNN makes a kernel for each shape (0.5 ms, some 0.5 MB), so rows are filled up to one of few
numbers. Rows are then alike however many there are; a single one would not be.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

LEAST_NUMBERS = 2**16  # of a matrix: for fewer, a call costs more than it saves
_STEPS = 8  # numbers of rows between a power of two and the next
_SHORTEST, _LONGEST = 4, 128  # steps
# Kernels that oneDNN keeps, of all shapes; 1,024 if nobody says, which may take a GiB.
_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


# x [n, in], weight [out, in] of any strides, bias [out] or None -> x W^T + b, [n, out]
Product = Callable[..., Tensor]


def faster(weight: Tensor) -> Product:  # [out, in]
    """Torch's product, or oneDNN's. Depends on nothing but the weight's kind and the processor, so
    that what is computed twice is computed alike.
    """
    wide = weight.dtype == torch.float32 and weight.numel() >= LEAST_NUMBERS
    chosen = weight.is_cpu and wide and _has_what_mkl_leaves()
    return product if chosen else functional.linear


def rows_computed(rows: int) -> int:
    """The least number of rows, not below these, for which kernels are made."""
    step = max(_SHORTEST, min(_LONGEST, (1 << (rows - 1).bit_length()) // (2 * _STEPS)))
    return -(-rows // step) * step


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `Product`."""
    rows = x.shape[0]
    if missing := rows_computed(rows) - rows:
        x = functional.pad(x, (0, 0, 0, missing))
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y.resize_(rows, y.shape[1])  # no view: a model may change it in place


def keep_few_kernels() -> None:
    """Bounds what kernels take where passes have many lengths, unless a user has said how many are
    kept. Read at oneDNN's first product.
    """
    os.environ.setdefault(*_KEPT)


def is_intel() -> bool:
    """Whether the processor is Intel's."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@cache
def _has_what_mkl_leaves() -> bool:
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not is_intel()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )

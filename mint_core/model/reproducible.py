"""Whether a row's bits depend on nothing but that row, and how a CPU's libraries can be had to
compute so.

Intel's MKL chooses kernels by the number of rows, and on processors with AVX-512 those of fewer
than 16 rows add up in another order than those of many. In its strict mode they do not. Measured
on one thread of a Xeon with AVX-512 (2026-11-29, torch 2.13): the same speed from 8 rows on, half
of it for a single one; without it rows of [n, 576] x [576, 576] differ for each n below 16.

torch computes a function of single numbers over a tensor in whole vectors, and what is left at its
end number by number, by other code: some functions (sigmoid, SiLU, softplus, GELU) then have other
last bits, in a few of a hundred numbers. Where rows lie close and their width fills no vectors, how
many rows there are says which numbers are left: a row's bits depend on its neighbours. A short
probe may well meet none of these numbers; with `ToldTails` all that are left are visibly off.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mint_core.lora.groups import LinearShape
from mint_core.lora.products.onednn import Product, is_intel
from mint_core.lora.segments import MIN_ROWS, VECTOR_BYTES

_VARIABLE = "MKL_CBWR"  # which MKL reads before its first product
_MODES = {"AVX512": "AVX512,STRICT", "AVX2": "AVX2,STRICT"}
_TRIED_ROWS = (MIN_ROWS, 5, 7, 15, 16, 33, 70)
_ROWS = 96
_OFF = 1.0 + 2.0**-6  # more than bfloat16 rounds
_TRIED, _PIECE = 4096, 15  # numbers, and of them at a time: fewer than any vectors


def ask_for_reproducible_products() -> None:
    """Has MKL compute rows alike however many there are, unless its user has chosen otherwise."""
    mode = _MODES.get(torch.backends.cpu.get_cpu_capability())
    if mode is not None and is_intel():  # on others' processors MKL goes ways of its own
        os.environ.setdefault(_VARIABLE, mode)


@torch.no_grad()
def rows_are_alike(
    products: Iterable[tuple[Product, LinearShape]], dtype: torch.dtype = torch.float32
) -> bool:
    """Whether the rows of products are the same, bit for bit, with whatever number of others from
    MIN_ROWS on: x W^T, and dy W on the way back.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {(product, s.in_features, s.out_features) for product, s in products}
    for product, inner, outer in shapes:
        weight = torch.randn(outer, inner, generator=generator).to(dtype)
        for matrix in (weight, weight.t()):
            left = torch.randn(_ROWS, matrix.shape[1], generator=generator).to(dtype)
            whole = product(left, matrix)
            if not all(torch.equal(product(left[-n:], matrix), whole[-n:]) for n in _TRIED_ROWS):
                return False
    return True


class ToldTails(TorchDispatchMode):
    """Around a pass on a CPU, forward or backward: numbers that are computed one by one are off, if
    they are of a function that has other bits for them.
    """

    _differ: ClassVar[dict[str, bool]] = {}  # by function and what it is told besides tensors

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and result.is_cpu
            and result.dim()
            and result.is_floating_point()
            and _is_of_single_numbers(func)
            and self._has_tails(func, args, kwargs or {})
        ):
            operands = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
            computed_singly(result, operands).mul_(_OFF)
        return result

    def _has_tails(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        told = [str(x.dtype) if isinstance(x, Tensor) else repr(x) for x in args]
        key = f"{func} {told} {kwargs}"
        if key not in self._differ:
            self._differ[key] = _differs(func, args, kwargs)
        return self._differ[key]


def _is_of_single_numbers(func: Any) -> bool:
    """As torch says; of functions back it does not say it of all."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_backward")
    packet = getattr(torch.ops.aten, name, None)
    overloads = (
        [func, *(getattr(packet, each) for each in packet.overloads())] if packet else [func]
    )
    return any(torch.Tag.pointwise in each.tags for each in overloads)


def _differs(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the function gives other bits to few numbers than to many."""
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        if not x.is_floating_point():
            return torch.randint(0, 2, (_TRIED,), generator=generator).to(x.dtype)
        exponents = torch.rand(_TRIED, generator=generator) * 4.0 - 3.0  # of 0.001 to 10
        return (torch.randn(_TRIED, generator=generator) * 10.0**exponents).to(x.dtype)

    whole = [drawn(x) for x in args]
    pieces = [
        [x[at : at + _PIECE].clone() if isinstance(x, Tensor) and x.dim() else x for x in whole]
        for at in range(0, _TRIED, _PIECE)
    ]
    together = func(*whole, **kwargs)
    apart = torch.cat([func(*piece, **kwargs) for piece in pieces])
    return not torch.equal(together.nan_to_num(), apart.nan_to_num())


def computed_singly(result: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """Those numbers of a function's result that torch computes one by one: a view. Dimensions that
    lie one after the other in all tensors are one to it; the innermost is cut into vectors.
    """
    order = sorted(range(result.dim()), key=result.stride, reverse=True)
    order = [d for d in order if result.shape[d] > 1]
    if not order:
        return result
    each = [result, *(x.expand(result.shape) for x in operands)]
    strides = [[x.stride(d) for d in order] for x in each]
    sizes = [result.shape[d] for d in order]
    if strides[0][-1] != 1 or any(own[-1] > 1 for own in strides):
        return result  # all of them
    while len(sizes) > 1 and all(own[-2] == own[-1] * sizes[-1] for own in strides):
        inner = sizes.pop()
        sizes[-1] *= inner
        for own in strides:
            del own[-2]
    run = sizes[-1]
    left = run % (VECTOR_BYTES // result.element_size())
    return result.as_strided([*sizes[:-1], left], strides[0], result.storage_offset() + run - left)

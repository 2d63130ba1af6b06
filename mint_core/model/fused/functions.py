"""The kernels under autograd. What they do slowly is said in `shortcuts.py`.

T: rows of the stream. s: head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class NormedSum(torch.autograd.Function):
    """x + added, and the RMS norm of that: `x, added or None, weight, eps -> sum, normed`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from mint_core.model.fused.norm_kernels import normed_sum  # Triton is not everywhere

        total, y = normed_sum(x, added, weight, eps)
        ctx.save_for_backward(total)
        ctx.weight, ctx.eps = weight, eps
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        from mint_core.model.fused.norm_kernels import normed_sum_back

        passed, dy = gradients
        (total,) = ctx.saved_tensors
        dx = passed
        if dy is not None:
            dx = normed_sum_back(total, ctx.weight, ctx.eps, dy, passed)
        return dx, dx if ctx.needs_input_grad[1] else None, None, None


class Gated(torch.autograd.Function):
    """act(gate) * up: `[T, 2 f], kind -> [T, f]`."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, kind: int) -> Tensor:
        from mint_core.model.fused.mlp_kernels import gated

        ctx.save_for_backward(wide)
        ctx.kind = kind
        return gated(wide, kind)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        from mint_core.model.fused.mlp_kernels import gated_back

        (wide,) = ctx.saved_tensors
        return gated_back(wide, gradients[0], ctx.kind), None


class Heads(torch.autograd.Function):
    """Queries and keys normed, where there is a norm, and turned; values as they are: `[T, all
    heads, s], cosines, sines, weight and eps or None, heads of each -> each [heads, T, s]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        cosines: Tensor,  # [T, 1, s]
        sines: Tensor,  # [T, 1, s]
        norm: tuple[Tensor, float] | None,
        counts: Sequence[int],  # of queries, keys, values
    ) -> tuple[Tensor, ...]:
        from mint_core.model.fused.head_kernels import turned

        turning = counts[0] + counts[1]
        both = turned(heads[:, :turning], cosines, sines, norm)
        ctx.save_for_backward(heads, cosines, sines)
        ctx.norm, ctx.counts = norm, counts
        queries, keys = both.transpose(0, 1).split_with_sizes(counts[:2])
        return queries, keys, heads[:, turning:].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        from mint_core.model.fused.head_kernels import turned_back

        heads, cosines, sines = ctx.saved_tensors
        return turned_back(heads, gradients, cosines, sines, ctx.norm), None, None, None, None

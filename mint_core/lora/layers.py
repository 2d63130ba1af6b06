"""Linear layers that apply many adapters at once: each to its own rows of a packed stream.

n: rows of a segment. r: stored rank.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mint_core.lora.bank import AdapterRow, Part

MIN_ROWS = 4  # a matmul with fewer rows takes another kernel, whose last bits differ


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive rows of the stream that share an adapter."""

    start: int
    stop: int  # at least start + MIN_ROWS
    row: AdapterRow | None = None  # None: the base model alone
    accumulate: bool = False  # whether backward adds to the row's gradient


@dataclass(slots=True)
class LoraContext:
    """What the layers of one model apply in the pass at hand. One object, shared by all of them."""

    segments: tuple[Segment, ...] = field(default=())


class MultiLoraLinear(nn.Module):
    """A frozen nn.Linear plus, for each segment of the stream, its adapter's B A."""

    def __init__(self, name: str, base: nn.Linear, context: LoraContext) -> None:
        super().__init__()
        self.name = name
        self.weight = base.weight
        self.bias = base.bias
        self.in_features = base.in_features
        self.out_features = base.out_features
        self._context = context

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        segments = [
            s for s in self._context.segments if s.row is not None and self.name in s.row.modules
        ]
        flat = x.reshape(-1, self.in_features)
        if segments:
            y: Tensor = LoraLinearFunction.apply(flat, self, segments)  # type: ignore[no-untyped-call]
        else:
            y = functional.linear(flat, self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b, and y[segment] += scale * (x[segment] A^T) B^T.

    Backward adds dA and dB straight to the rows' gradients, segment after segment: the sum of one
    adapter does not depend on its neighbours.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MultiLoraLinear, segments: list[Segment]) -> Tensor:
        y = functional.linear(x, layer.weight, layer.bias)
        shrunk = []
        for segment in segments:
            a, b = adapter_weights(segment, layer.name, x.dtype)
            h = x[segment.start : segment.stop] @ a.T  # [n, r]
            y[segment.start : segment.stop].addmm_(h, b.T, alpha=scale(segment))
            shrunk.append(h)
        ctx.save_for_backward(x, *shrunk)
        ctx.layer, ctx.segments = layer, segments
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        x, *shrunk = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dy @ ctx.layer.weight
        for segment, h in zip(ctx.segments, shrunk, strict=True):
            rows = slice(segment.start, segment.stop)
            dx[rows] += adapter_backward(segment, ctx.layer.name, x[rows], h, dy[rows])
        return dx, None, None


def adapter_weights(segment: Segment, module: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in the type that the base computes in."""
    assert segment.row is not None
    a, b = segment.row.views(Part.WEIGHTS, module)
    return a.to(dtype), b.to(dtype)


def scale(segment: Segment) -> float:
    assert segment.row is not None
    return segment.row.spec.scale


def adapter_backward(
    segment: Segment,
    module: str,
    x: Tensor,  # [n, in]
    h: Tensor,  # [n, r], x A^T
    dy: Tensor,  # [n, out]
) -> Tensor:  # [n, in]
    """The adapter's share of dx; adds dA and dB to the gradient if the segment accumulates."""
    assert segment.row is not None
    a, b = adapter_weights(segment, module, x.dtype)
    dh = (dy @ b) * scale(segment)  # [n, r]
    if segment.accumulate:
        grad_a, grad_b = segment.row.views(Part.GRADIENT, module)
        grad_a += dh.T @ x
        grad_b += (dy.T @ h) * scale(segment)
    return dh @ a


def install(model: nn.Module, context: LoraContext) -> None:
    """Puts a MultiLoraLinear in the place of every nn.Linear."""
    linears = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    for name, module in linears:
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, MultiLoraLinear(name, module, context))

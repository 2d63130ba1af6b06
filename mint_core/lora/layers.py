"""Linear layers that apply many adapters at once: each to its own rows of a packed stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mint_core.lora.algorithms import Adapted, Algorithm, choose
from mint_core.lora.columns import ActiveColumns
from mint_core.lora.segments import (
    MIN_ROWS,
    Segment,
    adapter_backward,
    adapter_weights,
    scale,
)

__all__ = [
    "MIN_ROWS",
    "LoraContext",
    "LoraLinearFunction",
    "MultiLoraLinear",
    "Segment",
    "adapter_backward",
    "adapter_weights",
    "install",
    "scale",
]


class LoraContext:
    """What the layers of one model apply in the pass at hand. One object, shared by all of them."""

    def __init__(self) -> None:
        self._segments: tuple[Segment, ...] = ()
        self._columns: ActiveColumns | None = None
        self._adapted: dict[tuple[Segment, ...], Adapted] = {}

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._segments

    @segments.setter
    def segments(self, segments: tuple[Segment, ...]) -> None:
        self._segments = segments
        self._adapted.clear()

    @property
    def columns(self) -> ActiveColumns | None:
        """What is applied in the place of segments."""
        return self._columns

    @contextmanager
    def applying(self, columns: ActiveColumns | None) -> Iterator[None]:
        """For passes whose rows are in any order; None: the base model alone."""
        self.segments = ()
        self._columns = columns
        try:
            yield
        finally:
            self._columns = None

    def adapted(self, module: str, like: Tensor) -> Adapted | None:
        """The segments that adapt a module; None if none does."""
        segments = tuple(s for s in self._segments if s.row is not None and module in s.row.modules)
        if not segments:
            return None
        if segments not in self._adapted:
            self._adapted[segments] = Adapted(segments, like.device, like.dtype)
        return self._adapted[segments]


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
        # Weights are frozen and gradients of adapters go straight to their rows: this tells
        # autograd where there is something to train, so that it goes back no further than that.
        self._trained = torch.zeros((), device=base.weight.device, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        flat = x.reshape(-1, self.in_features)
        columns = self._context.columns
        adapted = self._context.adapted(self.name, flat)
        if adapted is None:
            y = functional.linear(flat, self.weight, self.bias)
            if columns is not None:
                columns.add(flat, y, self.name)
        else:
            algorithm = choose(adapted, torch.is_grad_enabled())
            trained = self._trained if adapted.accumulates else None
            y = LoraLinearFunction.apply(flat, self, adapted, algorithm, trained)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b, and each segment's adapter on top.

    Backward adds dA and dB straight to the rows' gradients, segment after segment: the sum of one
    adapter does not depend on its neighbours.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: MultiLoraLinear,
        adapted: Adapted,
        algorithm: Algorithm,
        trained: Tensor | None,
    ) -> Tensor:
        y = functional.linear(x, layer.weight, layer.bias)
        ctx.save_for_backward(x, *algorithm.forward(x, y, adapted, layer.name))
        ctx.layer, ctx.adapted, ctx.algorithm = layer, adapted, algorithm
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, *saved = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dx = dy @ ctx.layer.weight if ctx.needs_input_grad[0] else None
        ctx.algorithm.backward((x, dy, dx), saved, ctx.adapted, ctx.layer.name)
        return dx, None, None, None, None


def install(model: nn.Module, context: LoraContext) -> None:
    """Puts a MultiLoraLinear in the place of every nn.Linear."""
    linears = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    for name, module in linears:
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, MultiLoraLinear(name, module, context))

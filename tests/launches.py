"""How many launches a GPU would be given, counted on a CPU: operators that reach torch's
dispatcher, less those that make views or memory, and our kernels, each once. What these compute is
left out: how many launches follow depends on no number.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mint_core.model.attention_kernels import Scores, causal_attention
from tests.interpreted_kernels import in_kernels, interpreter

# Operators that only describe memory, or have it given.
_VIEWS = """
    view _unsafe_view reshape transpose t permute expand slice select split split_with_sizes
    unsqueeze squeeze detach alias as_strided unbind diagonal lift_fresh
    empty empty_like new_empty new_empty_strided empty_strided _local_scalar_dense
"""
VIEWS = frozenset(_VIEWS.split())


class Launches(TorchDispatchMode):
    """Counts by name while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._paused = 0

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """Counts what is done meanwhile as one launch."""
        self.counts[name] += not self._paused
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not self._paused and name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Launches]:
    """Around a pass as a GPU launches it, with our kernels."""
    launches, execute = Launches(), interpreter.GridExecutor.__call__

    def launch(executor: Any, *_: Any, **__: Any) -> None:
        with launches.as_one(executor.fn.__name__):
            pass

    interpreter.GridExecutor.__call__ = launch
    try:
        with in_kernels(), launches:
            yield launches
    finally:
        interpreter.GridExecutor.__call__ = execute


class OneKernelAttention:
    """Attention of documents, of which a GPU computes all in one launch, forward and backward."""

    def __init__(self, bounds: list[int], launches: Launches) -> None:
        self.bounds = bounds
        self.launches = launches

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        output: Tensor = _Attention.apply(query, key, value, scores, self)  # type: ignore[no-untyped-call]
        return output

    def mix(self, *_: Any) -> Tensor:
        raise NotImplementedError

    def compute(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        sizes = [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]
        parts = zip(*(each.split(sizes, 1) for each in (query, key, value)), strict=True)
        return torch.cat([causal_attention(q, k, v, scores) for q, k, v in parts], dim=1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores, own: OneKernelAttention
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scores, ctx.own = scores, own
        with own.launches.as_one("attention"):
            return own.compute(query, key, value, scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own: OneKernelAttention = ctx.own
        with own.launches.as_one("attention backward"), torch.enable_grad():
            inputs = [each.detach().requires_grad_() for each in ctx.saved_tensors]
            output = own.compute(*inputs, ctx.scores)
            return *torch.autograd.grad(output, inputs, gradients[0]), None, None

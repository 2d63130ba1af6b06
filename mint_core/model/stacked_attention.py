"""Causal attention of many documents on a CPU in few calls: short ones of about one length are
filled up to the same length and stacked.

How far a document is filled up depends on its own length alone, and the kernel computes one after
the other, so neighbours change no bit. What fills up comes last, where no row of the document sees
it, and gets no gradient.

T: rows of the stream. N: rows of all stacks. n: documents of a stack, each of `length` rows.
h: heads. s: head size.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mint_core.model.attention_kernels import Scores

SHORT_TOKENS = 128  # beyond, what a document takes counts for more than its call
# What scaled_dot_product_attention calls on a CPU.
_forward: Callable[..., tuple[Tensor, Tensor]] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
)
_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
)


def filled_up(tokens: int) -> int:
    """The least of 4, 6, 8, 12, 16, 24, ..., 128 that holds a short document; the length of another
    is its own.
    """
    if tokens > SHORT_TOKENS:
        return tokens
    size = max(4, 1 << (tokens - 1).bit_length())
    return size * 3 // 4 if tokens <= size * 3 // 4 and size > 4 else size


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    rows: slice | Tensor  # of the stream, [n * length] if they do not lie side by side
    fillers: Tensor | None  # places in it that only fill up
    length: int

    def take(self, stream: Tensor, *, gradient: bool = False) -> Tensor:
        """[h, T, s] -> [n, h, length, s]. What fills up has no gradient."""
        rows = stream.transpose(0, 1)
        taken = rows[self.rows] if isinstance(self.rows, slice) else rows.index_select(0, self.rows)
        if gradient and self.fillers is not None:
            taken.index_fill_(0, self.fillers, 0.0)
        return taken.view(-1, self.length, *taken.shape[1:]).transpose(1, 2)


class Stacks:
    """The documents of a stream, by the lengths to which they are filled up."""

    def __init__(self, bounds: Sequence[int]) -> None:
        by_length: dict[int, list[tuple[int, int]]] = {}
        for start, stop in itertools.pairwise(bounds):
            by_length.setdefault(filled_up(stop - start), []).append((start, stop))
        self.stacks = [_stack(length, documents) for length, documents in by_length.items()]
        self._back = _places(by_length, bounds[-1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """[h, T, s] of each -> [h, T, s], scaled alone. Value and key heads have one size."""
        if torch.is_grad_enabled():
            output: Tensor = _Attention.apply(query, key, value, self, scores.scaling)  # type: ignore[no-untyped-call]
            return output
        return self.join([out for out, _ in self.each(query, key, value, scores.scaling)])

    def each(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Output [n, h, length, s], and logarithms of the sums of powers, of each stack."""
        return [
            _forward(*map(stack.take, (query, key, value)), 0.0, True, scale=scaling)
            for stack in self.stacks
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """[n, h, length, s] of each stack -> [h, T, s]."""
        flat = [part.transpose(1, 2).flatten(0, 1) for part in parts]
        rows = flat[0] if len(flat) == 1 else torch.cat(flat)  # [N, h, s]
        return (rows if self._back is None else rows.index_select(0, self._back)).transpose(0, 1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, stacks: Stacks, scaling: float
    ) -> Tensor:
        computed = stacks.each(query, key, value, scaling)
        ctx.save_for_backward(query, key, value, *itertools.chain.from_iterable(computed))
        ctx.stacks, ctx.scaling = stacks, scaling
        return stacks.join([output for output, _ in computed])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *computed = ctx.saved_tensors
        parts = []
        for stack, output, sums in zip(
            ctx.stacks.stacks, computed[::2], computed[1::2], strict=True
        ):
            inputs = map(stack.take, (query, key, value))
            gradient = stack.take(gradients[0], gradient=True)
            parts.append(_backward(gradient, *inputs, output, sums, 0.0, True, scale=ctx.scaling))
        dq, dk, dv = map(ctx.stacks.join, zip(*parts, strict=True))
        return dq, dk, dv, None, None


def _stack(length: int, documents: Sequence[tuple[int, int]]) -> _Stack:
    side_by_side = all(a[1] == b[0] for a, b in itertools.pairwise(documents))
    if side_by_side and all(stop - start == length for start, stop in documents):
        return _Stack(slice(documents[0][0], documents[-1][1]), None, length)
    rows: list[int] = []
    fillers: list[int] = []
    for start, stop in documents:
        rows += range(start, stop)
        missing = length - (stop - start)
        fillers += range(len(rows), len(rows) + missing)
        rows += [start] * missing  # some row of the same document
    return _Stack(torch.tensor(rows), torch.tensor(fillers) if fillers else None, length)


def _places(by_length: dict[int, list[tuple[int, int]]], tokens: int) -> Tensor | None:
    """Where each row of the stream is among those of the stacks, [T]; None: in its own place."""
    places = [0] * tokens
    at = 0
    for length, documents in by_length.items():
        for start, stop in documents:
            places[start:stop] = range(at, at + stop - start)
            at += length
    return None if places == list(range(at)) else torch.tensor(places)

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


class _Stack:
    def __init__(
        self,
        length: int,
        rows: Tensor | slice,  # [n * length], of the stream
        fillers: Tensor | None = None,  # which of them only fill up
    ) -> None:
        self._length = length
        self._rows = rows
        self._fillers = fillers

    @classmethod
    def of(cls, length: int, rows: Tensor, real: Tensor) -> "_Stack":
        """`real`: [n * length], False where a row only fills up."""
        whole = slice(int(rows[0]), int(rows[0]) + len(rows))
        side_by_side = torch.equal(rows, torch.arange(whole.start, whole.stop))
        fillers = None if real.all() else (~real).nonzero()[:, 0]
        return cls(length, whole if side_by_side else rows, fillers)

    def take(self, stream: Tensor, *, gradient: bool = False) -> Tensor:
        """[h, T, s] -> [n, h, length, s]. What fills up has no gradient."""
        rows = stream.transpose(0, 1)
        own = self._rows
        taken = rows[own] if isinstance(own, slice) else rows.index_select(0, own)
        if gradient and self._fillers is not None:
            taken.index_fill_(0, self._fillers, 0.0)
        return taken.view(-1, self._length, *taken.shape[1:]).transpose(1, 2)


class Stacks:
    """The documents of a stream, by the lengths to which they are filled up."""

    def __init__(self, bounds: Sequence[int]) -> None:
        by_length: dict[int, list[tuple[int, int]]] = {}
        for start, stop in itertools.pairwise(bounds):
            by_length.setdefault(filled_up(stop - start), []).append((start, stop))
        self._back: Tensor | None = None
        (length, documents), *others = by_length.items()
        if not others and len(documents) * length == bounds[-1] - bounds[0]:
            # As they lie: so are most small passes, which are mostly calls.
            self.stacks = [_Stack(length, slice(bounds[0], bounds[-1]))]
            return
        parts = [_rows(length, documents) for length, documents in by_length.items()]
        each = zip(by_length, parts, strict=True)
        self.stacks = [_Stack.of(length, *own) for length, own in each]
        rows, real = map(torch.cat, zip(*parts, strict=True))  # [N]
        places = real.nonzero()[:, 0]
        back = torch.empty_like(places)  # [T], where each row of the stream is among those
        back[rows[places]] = places
        self._back = None if torch.equal(back, torch.arange(len(rows))) else back

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


def _rows(length: int, documents: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Rows of the stream in a stack, and which of them do not only fill up, [n * length] each."""
    starts, stops = torch.tensor(documents)[..., None].unbind(1)  # [n, 1]
    at = torch.arange(length)
    real = at < stops - starts  # [n, length]
    # What fills up is some row of the same document.
    return torch.where(real, starts + at, starts).flatten(), real.flatten()

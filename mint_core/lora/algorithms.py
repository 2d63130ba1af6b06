"""Ways to apply many adapters to one stream, each to its own segments, and which is used where.

    y[segment] += scale * (x[segment] A^T) B^T

and back: dx[segment] += scale * dy[segment] B A, dA and dB into the row's gradient. The loop over
segments is the oracle of the others.

T: rows of the stream. G: groups. r: stored rank. R: sum of stored ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mint_core.lora.bank import Part
from mint_core.lora.segments import Segment, adapter_weights, add_gradient, scale

CONCAT_RANKS = 512  # most columns side by side: beyond, what is cut out costs more than launches
CONCAT_ROWS = 256


@dataclass(frozen=True, eq=False)
class Adapted:
    """The segments of a pass that adapt a module, in the stream's order; all have a row. Modules
    that the same adapters train share one, and with it the tensors that describe it.
    """

    segments: tuple[Segment, ...]
    device: torch.device
    dtype: torch.dtype  # that the base computes in
    _weights: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @cached_property
    def accumulates(self) -> bool:
        """Whether backward adds to any row's gradient."""
        return any(segment.accumulate for segment in self.segments)

    @property
    def covered(self) -> slice:
        """From the first segment to the end of the last."""
        return slice(self.segments[0].start, self.segments[-1].stop)

    @cached_property
    def groups(self) -> tuple[Segment, ...]:
        """The segments, and between them what no adapter touches."""
        groups: list[Segment] = []
        for segment in self.segments:
            if groups and groups[-1].stop < segment.start:
                groups.append(Segment(groups[-1].stop, segment.start))
            groups.append(segment)
        return tuple(groups)

    @cached_property
    def factors(self) -> list[float]:
        """The scale of each segment."""
        return [scale(segment) for segment in self.segments]

    def parts(self, stream: Tensor) -> list[Tensor]:  # [T, ...] -> per segment, [n, ...]
        if len(self.segments) == 1:
            return [stream[self.covered]]
        # One split: a pass over many short segments is mostly calls.
        parts = stream[self.covered].split_with_sizes(self._sizes)
        return [part for part, group in zip(parts, self.groups, strict=True) if group.row]

    @cached_property
    def _sizes(self) -> list[int]:
        return [group.stop - group.start for group in self.groups]

    def weights(self, module: str) -> list[tuple[Tensor, Tensor]]:
        """A [r, in] and B [out, r] of each segment."""
        if module not in self._weights:
            self._weights[module] = [
                adapter_weights(segment, module, self.dtype) for segment in self.segments
            ]
        return self._weights[module]

    @cached_property
    def ends(self) -> Tensor:  # [G] int32, where each group ends in the covered rows
        ends = [group.stop - self.covered.start for group in self.groups]
        return torch.tensor(ends, dtype=torch.int32, device=self.device)

    @cached_property
    def scales(self) -> Tensor:  # [covered, 1]
        per_group = [scale(group) if group.row else 0.0 for group in self.groups]
        lengths = torch.tensor([group.stop - group.start for group in self.groups])
        scales = torch.tensor(per_group, dtype=self.dtype).repeat_interleave(lengths)
        return scales[:, None].to(self.device)

    @cached_property
    def own(self) -> Tensor:  # [covered, R], which columns belong to a row's own adapter
        owners = [(i, _rank(s)) for i, s in enumerate(self.groups) if s.row]
        columns = torch.cat([torch.full((rank,), i) for i, rank in owners])
        lengths = torch.tensor([group.stop - group.start for group in self.groups])
        rows = torch.arange(len(self.groups)).repeat_interleave(lengths)
        return (rows[:, None] == columns).to(self.device)


class Algorithm(Protocol):
    """Applies the adapters to one module."""

    def forward(self, x: Tensor, y: Tensor, adapted: Adapted, module: str) -> tuple[Tensor, ...]:
        """Adds to y [T, out]; returns what backward needs beside x [T, in]."""
        ...

    def backward(
        self,
        tensors: tuple[
            Tensor, Tensor, Tensor | None
        ],  # x [T, in], dy [T, out], dx [T, in] if asked for
        saved: Sequence[Tensor],  # as forward returned them
        adapted: Adapted,
        module: str,
    ) -> None:
        """Adds to dx and to the gradients of rows that accumulate."""
        ...


class Loop:
    """Segment after segment. What a segment gets depends on its own rows alone, bit for bit."""

    def forward(self, x: Tensor, y: Tensor, adapted: Adapted, module: str) -> tuple[Tensor, ...]:
        shrunk = []
        streams = (adapted.factors, adapted.weights(module), adapted.parts(x), adapted.parts(y))
        for factor, (a, b), own_x, own_y in zip(*streams, strict=True):
            h = own_x.mm(a.t())  # [n, r]
            own_y.addmm_(h, b.t(), alpha=factor)
            shrunk.append(h)
        return tuple(shrunk)

    def backward(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        saved: Sequence[Tensor],
        adapted: Adapted,
        module: str,
    ) -> None:
        x, dy = map(adapted.parts, tensors[:2])
        dx = None if tensors[2] is None else adapted.parts(tensors[2])
        streams = zip(adapted.segments, adapted.weights(module), saved, strict=True)
        for i, (segment, (a, b), h) in enumerate(streams):
            dh = dy[i].mm(b)  # [n, r], but for the factor
            if dx is not None:
                dx[i].addmm_(dh, a, alpha=adapted.factors[i])
            if segment.accumulate:
                add_gradient(segment, module, (x[i], h, dy[i], dh))


class Grouped:
    """A grouped matrix product for all adapters: A and B are copied side by side, padded to the
    largest rank among them. Each group is reduced by itself, so nobody's NaN reaches another.
    """

    def forward(self, x: Tensor, y: Tensor, adapted: Adapted, module: str) -> tuple[Tensor, ...]:
        a, b = _stacked(adapted, module)
        rows, ends = adapted.covered, adapted.ends
        h = functional.grouped_mm(x[rows], a.transpose(1, 2), offs=ends) * adapted.scales
        y[rows] += functional.grouped_mm(h, b.transpose(1, 2), offs=ends)
        return (h,)

    def backward(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        saved: Sequence[Tensor],
        adapted: Adapted,
        module: str,
    ) -> None:
        rows, ends = adapted.covered, adapted.ends
        x, dy = (part[rows] for part in tensors[:2])
        (h,) = saved
        a, b = _stacked(adapted, module)
        dh = functional.grouped_mm(dy, b, offs=ends) * adapted.scales
        if tensors[2] is not None:
            tensors[2][rows] += functional.grouped_mm(dh, a, offs=ends)
        if not adapted.accumulates:
            return
        grads_a = functional.grouped_mm(dh.T, x, offs=ends)  # [G, r, in]
        grads_b = functional.grouped_mm(dy.T, h, offs=ends)  # [G, out, r]
        for group, grad_a, grad_b in zip(adapted.groups, grads_a, grads_b, strict=True):
            if group.accumulate:
                assert group.row is not None
                row_a, row_b = group.row.views(Part.GRADIENT, module)
                row_a += grad_a[: _rank(group)]
                row_b += grad_b[:, : _rank(group)]


class Concat:
    """Two dense products, A and B of all adapters one after the other; what a row gets of others'
    columns is cut out in between. Forward only: in a sum over all rows, as dA is, somebody's NaN
    would reach everybody.
    """

    def forward(self, x: Tensor, y: Tensor, adapted: Adapted, module: str) -> tuple[Tensor, ...]:
        pairs = [adapter_weights(s, module, x.dtype) for s in adapted.segments]
        a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
        rows = adapted.covered
        add_side_by_side(x[rows], y[rows], (a, b.T), adapted.own, adapted.scales)
        return ()

    def backward(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        saved: Sequence[Tensor],
        adapted: Adapted,
        module: str,
    ) -> None:
        raise AssertionError("chosen for passes without backward alone")


def add_side_by_side(
    x: Tensor,  # [rows, in]
    y: Tensor,  # [rows, out]; added to
    weights: tuple[Tensor, Tensor],  # A [R, in] and B, transposed, [R, out]: finite
    own: Tensor,  # [rows, R] whether a column belongs to a row's adapter
    scales: Tensor,  # of rows [rows, 1] or of columns [R]
) -> None:
    """Applies adapters that lie one after the other. What others' columns make of a row is cut out,
    not multiplied by 0: it may be infinite.
    """
    a, b = weights
    h = torch.where(own, (x @ a.T) * scales, 0.0)  # [rows, R]
    y.addmm_(h, b)


LOOP, GROUPED, CONCAT = Loop(), Grouped(), Concat()


def choose(adapted: Adapted, backward: bool) -> Algorithm:
    """The algorithm for a pass.

    CPU: the loop, always. Time over the loop's, least and most of three shapes
    (benchmarks/adapter_algorithms.py; 1 thread of an AMD EPYC that others used too, torch 2.13,
    2026-11-24):

        adapters x rows                      1 x 8      1 x 256    8 x 8      8 x 256    32 x 32
        grouped, with backward, rank 8 - 64  2.4 - 3.4  1.3 - 2.4  1.7 - 3.2  1.2 - 2.0  1.3 - 2.0
        concat, forward, rank 8              1.3 - 1.7  1.1 - 1.3  0.8 - 2.7  2.7 - 2.8  3 - 8
        concat, forward, rank 64             1.5 - 4.5  1.1 - 1.3  2.5 - 4.7  6.6 - 7.3  14 - 18

    It also alone keeps a run's bits independent of its neighbours. CUDA: what counts is launches,
    which the loop makes per segment; grouped products are fast in bfloat16 alone. Not measured yet.
    """
    if adapted.device.type == "cpu" or len(adapted.segments) == 1:
        return LOOP
    if not backward and _is_small(adapted):
        return CONCAT
    return GROUPED if adapted.dtype == torch.bfloat16 else LOOP


def _is_small(adapted: Adapted) -> bool:
    rows = adapted.covered.stop - adapted.covered.start
    return rows <= CONCAT_ROWS and sum(map(_rank, adapted.segments)) <= CONCAT_RANKS


def _rank(segment: Segment) -> int:
    assert segment.row is not None
    return segment.row.bank.stored_rank


def _stacked(adapted: Adapted, module: str) -> tuple[Tensor, Tensor]:
    """A [G, r, in] and B [G, out, r] of the groups; zeros where no adapter is."""
    first_a, first_b = adapter_weights(adapted.segments[0], module, adapted.dtype)
    groups, rank = adapted.groups, max(map(_rank, adapted.segments))
    a = first_a.new_zeros(len(groups), rank, first_a.shape[1])
    b = first_b.new_zeros(len(groups), first_b.shape[0], rank)
    for i, group in enumerate(groups):
        if group.row:
            own_a, own_b = group.row.views(Part.WEIGHTS, module)
            a[i, : _rank(group)] = own_a
            b[i, :, : _rank(group)] = own_b
    return a, b

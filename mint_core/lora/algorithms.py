"""Ways to apply many adapters to one stream, each to its own segments, and which is used where.

    y[segment] += scale * (x[segment] A^T) B^T

and back: dx[segment] += scale * dy[segment] B A, dA and dB into the row's gradient; for all modules
of a group at once: their A's are one matrix, their B's go each from its ranks to its columns. The
loop over segments is the oracle of the others.

T: rows of the stream. n: of a segment. S: stretches. r: stored rank. m: modules of a group.
R: sum of all ranks. W: sum of the modules' columns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from mint_core.lora import kernels
from mint_core.lora.bank import AdapterRow, GroupMatrices, Part, RankBank
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.segment_tables import GroupTables, Tables, group_tables
from mint_core.lora.segments import Segment, add_product, scale


@dataclass(frozen=True, eq=False)
class Adapted:
    """The segments of a pass that adapt a group, in the stream's order; all have a row. Groups
    that the same adapters train share one, and with it the tensors that describe it.
    """

    segments: tuple[Segment, ...]
    device: torch.device
    dtype: torch.dtype  # that the base computes in
    recorded: Tables | None = None  # those of a recorded pass, which names them for all groups
    _weights: dict[str, list[GroupMatrices]] = field(default_factory=dict)
    _casts: dict[AdapterRow, Tensor] = field(default_factory=dict)  # [params]

    @cached_property
    def accumulates(self) -> bool:
        """Whether backward adds to any row's gradient."""
        return any(segment.accumulate for segment in self.segments)

    @cached_property
    def algorithm(self) -> "Algorithm":
        """That applies them."""
        return choose(self)

    @property
    def covered(self) -> slice:
        """From the first segment to the end of the last."""
        return slice(self.segments[0].start, self.segments[-1].stop)

    @cached_property
    def stretches(self) -> tuple[Segment, ...]:
        """The segments, and between them what no adapter touches."""
        stretches: list[Segment] = []
        for segment in self.segments:
            if stretches and stretches[-1].stop < segment.start:
                stretches.append(Segment(stretches[-1].stop, segment.start))
            stretches.append(segment)
        return tuple(stretches)

    @cached_property
    def factors(self) -> list[float]:
        """The scale of each segment."""
        return [scale(segment) for segment in self.segments]

    def parts(self, stream: Tensor) -> Sequence[Tensor]:  # [T, ...] -> per segment, [n, ...]
        if len(self.segments) == 1:
            only = self.segments[0]
            whole = only.start == 0 and only.stop == stream.shape[0]
            return (stream,) if whole else (stream[self.covered],)
        # One split: a pass over many short segments is mostly calls.
        parts = stream[self.covered].split_with_sizes(self._sizes)
        if len(parts) == len(self.segments):
            return parts
        return [part for part, own in zip(parts, self.stretches, strict=True) if own.row]

    @cached_property
    def _sizes(self) -> list[int]:
        return [stretch.stop - stretch.start for stretch in self.stretches]

    def weights(self, group: ModuleGroup) -> list[GroupMatrices]:
        """A and B of each segment in the type that the base computes in."""
        name = group.modules[0]
        if name not in self._weights:
            self._weights[name] = [
                self._weights_of(segment.row, group) for segment in self.segments if segment.row
            ]
        return self._weights[name]

    def _weights_of(self, row: AdapterRow, group: ModuleGroup) -> GroupMatrices:
        own = row.group(Part.WEIGHTS, group)
        if own.a.dtype == self.dtype:
            return own
        if row not in self._casts:  # the whole row in one call, for all groups
            self._casts[row] = row.part(Part.WEIGHTS).to(self.dtype)
        return row.bank.group_matrices(self._casts[row], group, own.members)

    @cached_property
    def _widest(self) -> RankBank:
        banks = (segment.row.bank for segment in self.segments if segment.row)
        return max(banks, key=lambda bank: bank.stored_rank)

    @cached_property
    def _rows(self) -> Tensor:  # [S, params]
        """Weights of the stretches, one below the other, each as a row of the widest bank; zero
        where no adapter is.
        """
        size = len(self.stretches), self._widest.row_size
        rows = torch.zeros(size, device=self.device, dtype=self.dtype)
        for own, stretch in zip(rows, self.stretches, strict=True):
            if stretch.row:
                self._widest.take(own, stretch.row.part(Part.WEIGHTS), stretch.row.bank)
        return rows

    @cached_property
    def tables(self) -> Tables:
        """For kernels."""
        return self.recorded or Tables.of(self.segments, self.device)

    def stacked(self, group: ModuleGroup) -> GroupMatrices:
        """A [S, m r, in] and B of all stretches, filled up with zeros to the largest rank."""
        return self._widest.group_matrices(self._rows, group, range(len(group.modules)))

    @cached_property
    def ends(self) -> Tensor:  # [S] int32, where each stretch ends in the covered rows
        ends = [stretch.stop - self.covered.start for stretch in self.stretches]
        return torch.tensor(ends, dtype=torch.int32, device=self.device)

    @cached_property
    def scales(self) -> Tensor:  # [covered, 1]
        each = [scale(stretch) if stretch.row else 0.0 for stretch in self.stretches]
        scales = torch.tensor(each, dtype=self.dtype).repeat_interleave(torch.tensor(self._sizes))
        return scales[:, None].to(self.device)


@dataclass(frozen=True, slots=True)
class Gradients:
    """What backward reads, and where it adds to."""

    x: Tensor  # [T, in]
    dy: Sequence[Tensor]  # of each module of the group, [T, out]
    dx: Tensor | None  # [T, in] if asked for


class Loop:
    """Segment after segment. What a segment gets depends on its own rows alone, bit for bit."""

    def forward(
        self, x: Tensor, y: Sequence[Tensor], adapted: Adapted, group: ModuleGroup
    ) -> tuple[Tensor, ...]:
        """Adds to y of each module, [T, out]; returns what backward needs beside x [T, in]."""
        outputs = [adapted.parts(part) for part in y]
        shrunk: list[Tensor] = []  # of each segment, of each module, x A^T [n, r]
        streams = zip(adapted.factors, adapted.weights(group), adapted.parts(x), strict=True)
        for i, (factor, own, rows) in enumerate(streams):
            h = rows.mm(own.a_t)  # [n, m r]
            parts = (h,) if len(own.ranks) == 1 else h.split_with_sizes(own.ranks, 1)
            for member, part, b_t in zip(own.members, parts, own.b_t, strict=True):
                outputs[member][i].addmm_(part, b_t, alpha=factor)
            shrunk += parts
        return tuple(shrunk)

    def backward(
        self, tensors: Gradients, saved: Sequence[Tensor], adapted: Adapted, group: ModuleGroup
    ) -> None:
        """Adds to dx and to the gradients of rows that accumulate. `saved`: as forward returned
        it.
        """
        x, dys = adapted.parts(tensors.x), [adapted.parts(dy) for dy in tensors.dy]
        dx = None if tensors.dx is None else adapted.parts(tensors.dx)
        shrunk = iter(saved)
        for i, (segment, own) in enumerate(
            zip(adapted.segments, adapted.weights(group), strict=True)
        ):
            factor = adapted.factors[i]
            dy = [dys[member][i] for member in own.members]
            parts = [next(shrunk) for _ in dy]
            dh = _shrink_back(dy, own)
            if dx is not None:
                dx[i].addmm_(dh, own.a, alpha=factor)
            if segment.accumulate and segment.row is not None:
                gradient = segment.row.group(Part.GRADIENT, group)
                add_product(gradient.a, dh.t(), x[i], factor)
                for grad_b_t, h, own_dy in zip(gradient.b_t, parts, dy, strict=True):
                    add_product(grad_b_t, h.t(), own_dy, factor)


def _shrink_back(dy: Sequence[Tensor], own: GroupMatrices) -> Tensor:  # [n, m r]
    """dy B of each module, but for the factor."""
    if len(dy) == 1:
        return dy[0].mm(own.b[0])
    dh = dy[0].new_empty(dy[0].shape[0], own.a.shape[0])
    for part, own_dy, b in zip(dh.split_with_sizes(own.ranks, 1), dy, own.b, strict=True):
        torch.mm(own_dy, b, out=part)
    return dh


class Grouped:
    """A grouped matrix product for all adapters. Each stretch is reduced by itself, so nobody's NaN
    reaches another.

    Adapters are copied side by side once for all groups of a pass, padded to the largest rank among
    them.
    """

    def forward(
        self, x: Tensor, y: Sequence[Tensor], adapted: Adapted, group: ModuleGroup
    ) -> tuple[Tensor, ...]:
        own, rows, ends = adapted.stacked(group), adapted.covered, adapted.ends
        h = functional.grouped_mm(x[rows], own.a_t, offs=ends) * adapted.scales  # [covered, m r]
        for part, own_h, b_t in zip(y, h.split(own.ranks, 1), own.b_t, strict=True):
            part[rows] += functional.grouped_mm(own_h, b_t, offs=ends)
        return (h,)

    def backward(
        self, tensors: Gradients, saved: Sequence[Tensor], adapted: Adapted, group: ModuleGroup
    ) -> None:
        own, rows, ends = adapted.stacked(group), adapted.covered, adapted.ends
        x, dys = tensors.x[rows], [dy[rows] for dy in tensors.dy]
        parts = [functional.grouped_mm(dy, b, offs=ends) for dy, b in zip(dys, own.b, strict=True)]
        dh = torch.cat(parts, dim=1) * adapted.scales
        if tensors.dx is not None:
            tensors.dx[rows] += functional.grouped_mm(dh, own.a, offs=ends)
        if not adapted.accumulates:
            return
        (h,) = saved
        grads_a = functional.grouped_mm(dh.T, x, offs=ends).float()  # [S, m r, in]
        grads_b_t = [  # each [S, r, out]
            functional.grouped_mm(own_h.T, dy, offs=ends).float()
            for own_h, dy in zip(h.split(own.ranks, 1), dys, strict=True)
        ]
        _add(adapted, group, grads_a.split(own.ranks, 1), grads_b_t)


def _add(
    adapted: Adapted,
    group: ModuleGroup,
    grads_a: Sequence[Tensor],  # of each module, [S, r, in]
    grads_b_t: Sequence[Tensor],  # of each module, [S, r, out]
) -> None:
    """Adds to the gradients of the rows that accumulate what is theirs."""
    totals: list[Tensor] = []
    added: list[Tensor] = []
    for i, stretch in enumerate(adapted.stretches):
        if stretch.row and stretch.accumulate:
            gradient = stretch.row.group(Part.GRADIENT, group)
            totals += gradient.each
            for grads in (grads_a, grads_b_t):
                added += [grads[m][i, : stretch.row.bank.stored_rank] for m in gradient.members]
    torch._foreach_add_(totals, added)


class Kernels:
    """Kernels of our own: a launch for all adapters and all modules of a group at a time. What a
    segment gets depends on its own rows alone, bit for bit.
    """

    def forward(
        self, x: Tensor, y: Sequence[Tensor], adapted: Adapted, group: ModuleGroup
    ) -> tuple[Tensor, ...]:
        from mint_core.lora import segment_kernels  # Triton is not everywhere

        tables, own = adapted.tables, _tables_of(adapted, group)
        x = _dense(x)
        h = segment_kernels.shrink(x, tables, own)
        segment_kernels.expand(h, _side_by_side(y), tables, own)
        return (h,)

    def backward(
        self, tensors: Gradients, saved: Sequence[Tensor], adapted: Adapted, group: ModuleGroup
    ) -> None:
        from mint_core.lora import segment_kernels

        tables, own = adapted.tables, _tables_of(adapted, group)
        (h,), dy = saved, _side_by_side(tensors.dy)
        dh = segment_kernels.shrink(dy, tables, own, back=True)
        if tensors.dx is not None:
            segment_kernels.expand(dh, tensors.dx, tables, own, back=True)
        if adapted.accumulates:
            segment_kernels.accumulate(h, dh, _dense(tensors.x), dy, tables, own)


def _tables_of(adapted: Adapted, group: ModuleGroup) -> GroupTables:
    row = adapted.segments[0].row
    assert row is not None
    return group_tables(group, row.bank.unit(group), adapted.device)


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:  # each [T, width] -> [T, W]
    """The tensor whose columns the parts are; a copy where they are tensors of their own."""
    first, size = parts[0], parts[0].element_size()
    ends = list(itertools.accumulate(part.shape[1] for part in parts))
    places = [first.data_ptr() + size * at for at in (0, *ends)]
    if all(part.data_ptr() == place for part, place in zip(parts, places, strict=False)):
        return first.as_strided((first.shape[0], ends[-1]), first.stride())
    return torch.cat(list(parts), dim=1)


Algorithm = Loop | Grouped | Kernels  # applies the adapters to a group of modules
LOOP, GROUPED, KERNELS = Loop(), Grouped(), Kernels()
MOST_KERNEL_ROWS = 4096  # of a pass that waits for launches


def choose(adapted: Adapted) -> Algorithm:
    """The algorithm for a pass.

    CPU: the loop, always; it also alone keeps a run's bits independent of its neighbours. Time of
    grouped products, with backward, over the loop's, least and most of three shapes
    (benchmarks/adapter_algorithms.py; 1 thread of an AMD EPYC that others used too, torch 2.13,
    2026-11-24):

        adapters x rows                      1 x 8      1 x 256    8 x 8      8 x 256    32 x 32
        rank 8 - 64                          2.4 - 3.4  1.3 - 2.4  1.7 - 3.2  1.2 - 2.0  1.3 - 2.0

    CUDA: what counts is launches, which the loop makes per segment; grouped products are fast in
    bfloat16 alone. Milliseconds for q, k and v of 4,096 rows, rank 32, forward and backward
    (benchmarks/gpu_checklist.py; H200, torch 2.11, 2026-11-26):

        adapters      1      8      32
        loop          0.93   6.5    28
        grouped       0.96   1.1    2.0

    Up to some rows there, kernels that take all adapters in a launch each; they have not been
    timed on a GPU.
    """
    covered = adapted.covered
    if kernels.run_on(adapted.device) and covered.stop - covered.start <= MOST_KERNEL_ROWS:
        return KERNELS
    if adapted.device.type == "cpu" or len(adapted.segments) == 1:
        return LOOP
    return GROUPED if adapted.dtype == torch.bfloat16 else LOOP

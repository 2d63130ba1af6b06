"""Adapters of rowwise segments, for passes that decode: few rows of one adapter or of many.

A row is one row of one adapter in every product, whatever is computed with it, so its bits do not
depend on others. What such passes cost is calls. Rows of one adapter are one call; and the weights
of adapters in use, the hot ones, are copied side by side, so that a product of each with one row of
its own is one call as well: a lane.

T: rows of the stream. n: of a segment. S: slots of a lane. r: stored rank. m: modules of a group.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow, GroupMatrices, Part, RankBank, zero_vector
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.segments import Segment, one_by_one, products, scale

MOST_BYTES = 256 * 1024**2  # of the hot rows of one rank class


class OneAdapter:
    """All rows of a segment."""

    def __init__(self, segment: Segment, row: AdapterRow, tokens: int) -> None:
        self._row = row
        self._factor = scale(segment)
        # None: the whole stream.
        self._rows = None if segment.stop - segment.start == tokens else segment.rows

    def add(self, x: Tensor, y: Sequence[Tensor], group: ModuleGroup) -> None:
        """Adds to y of each module, [T, out], what the adapter makes of x [T, in]."""
        if not self._row.trains(group):
            return
        own, rows = self._row.group(Part.WEIGHTS, group), self._rows
        h = one_by_one(x if rows is None else x[rows], own.a_t.to(x.dtype))  # [n, m r]
        h.mul_(self._factor)
        parts = (h,) if len(own.ranks) == 1 else h.split_with_sizes(own.ranks, 1)
        for member, part, b_t in zip(own.members, parts, own.b_t, strict=True):
            output = y[member] if rows is None else y[member][rows]
            output.add_(one_by_one(part, b_t.to(x.dtype)))


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """Rows of the stream, at most one of each hot adapter."""

    hot: "HotRows"
    slots: int  # the first so many
    scales: Tensor  # [S, 1, 1]
    rows: Tensor  # [S] of the stream; some row for a slot that has none
    own: Tensor  # [n] slots that have a row
    targets: Tensor  # [n] rows of the stream that they have
    in_order: bool  # slot i has row i of the stream, for all rows

    def add(self, x: Tensor, y: Sequence[Tensor], group: ModuleGroup) -> None:
        """See OneAdapter."""
        if not self.hot.trains(group, self.slots):
            return
        own = self.hot.group(group)
        items = x if self.in_order else x.index_select(0, self.rows)
        h = products(items[:, None], own.a_t[: self.slots]).mul_(self.scales)  # [S, 1, m r]
        for output, part, b_t in zip(y, h.split_with_sizes(own.ranks, 2), own.b_t, strict=True):
            added = products(part, b_t[: self.slots])[:, 0]  # [S, out]
            if self.in_order:
                output.add_(added)
            else:
                output.index_add_(0, self.targets, added.index_select(0, self.own))


RowProducts = OneAdapter | Lane  # applies adapters to some rows of the stream


class HotRows:
    """Copies of the adapters of one rank class that the last passes applied."""

    def __init__(self, bank: RankBank, dtype: torch.dtype, most_bytes: int) -> None:
        self._bank = bank
        self.size = max(1, most_bytes // bank.part_bytes)
        size = self.size * bank.row_size * dtype.itemsize // 4
        memory = zero_vector(size, torch.device("cpu")).view(dtype)
        self._rows = memory.view(self.size, bank.row_size)
        self._holders: list[AdapterRow | None] = [None] * self.size
        self._slots: dict[AdapterRow, tuple[int, int]] = {}  # and the version that is there
        self._groups: dict[str, GroupMatrices] = {}

    def admit(self, rows: Collection[AdapterRow]) -> list[int]:
        """Slots of all these, which are different ones, at most `size`."""
        free = (slot for slot, holder in enumerate(self._holders) if holder not in rows)
        for row in rows:
            slot, version = self._slots.get(row, (-1, -1))
            if slot < 0:
                slot = next(free)
            if version != row.version:
                self._take(row, slot)
        return [self._slots[row][0] for row in rows]

    def _take(self, row: AdapterRow, slot: int) -> None:
        if (holder := self._holders[slot]) is not None:
            del self._slots[holder]
        self._rows[slot] = row.part(Part.WEIGHTS)
        self._holders[slot], self._slots[row] = row, (slot, row.version)

    def group(self, group: ModuleGroup) -> GroupMatrices:
        """A [size, m r, in] and B of all slots."""
        name = group.modules[0]
        if name not in self._groups:
            members = range(len(group.modules))
            self._groups[name] = self._bank.group_matrices(self._rows, group, members)
        return self._groups[name]

    def trains(self, group: ModuleGroup, slots: int) -> bool:
        """Whether an adapter in the first slots has a module in the group."""
        return any(holder.trains(group) for holder in self._holders[:slots] if holder)


class Lanes:
    """All hot rows, and how they are applied in a pass."""

    def __init__(self, dtype: torch.dtype, most_bytes: int = MOST_BYTES) -> None:
        self._dtype = dtype  # that the base computes in
        self._most_bytes = most_bytes
        self._hot: dict[RankBank, HotRows] = {}

    def of(self, segments: Sequence[Segment]) -> list[RowProducts]:
        """The products of a pass over a stream of these segments: for those that are rowwise and
        adapted, no two by the same adapter.
        """
        tokens = segments[-1].stop if segments else 0
        by_bank: dict[RankBank, list[Segment]] = {}
        for segment in segments:
            if segment.rowwise and segment.row is not None:
                by_bank.setdefault(segment.row.bank, []).append(segment)
        products: list[RowProducts] = []
        for bank, group in by_bank.items():
            if bank not in self._hot:
                self._hot[bank] = HotRows(bank, self._dtype, self._most_bytes)
            hot = self._hot[bank]
            sizes = [s.stop - s.start for s in group]
            cast = self._dtype != torch.float32
            count = _lanes_for(sizes, cast) if len(group) <= hot.size else 0
            if count:
                products += _lanes(hot, group, count, tokens)
            for segment in group:
                left = replace(segment, start=segment.start + count)
                if left.row is not None and left.start < left.stop:
                    products.append(OneAdapter(left, left.row, tokens))
        return products


def _lanes_for(rows: Sequence[int], cast: bool) -> int:
    """How many lanes make the fewest calls, a lane costing what one segment does, for adapters with
    so many rows each. As many as that where a segment's would be cast for each call.
    """
    counts = range(max(rows) + 1)
    return min(
        reversed(counts) if cast else counts,
        key=lambda count: count + sum(n > count for n in rows),
    )


def _lanes(hot: HotRows, group: Sequence[Segment], count: int, tokens: int) -> Iterator[Lane]:
    slots = hot.admit([segment.row for segment in group if segment.row])
    for number in range(count):
        places = {
            slot: segment.start + number
            for slot, segment in zip(slots, group, strict=True)
            if segment.start + number < segment.stop
        }
        size = max(places) + 1
        factors = {slot: scale(segment) for slot, segment in zip(slots, group, strict=True)}
        yield Lane(
            hot,
            size,
            torch.tensor([factors.get(slot, 1.0) for slot in range(size)])[:, None, None],
            torch.tensor([places.get(slot, 0) for slot in range(size)]),
            torch.tensor(list(places)),
            torch.tensor(list(places.values())),
            in_order=size == tokens and all(slot == row for slot, row in places.items()),
        )

"""Adapters side by side in tensors that stay where they are, for passes of few rows in any order.

A captured CUDA graph reads the same memory at every replay, so adapters come to it: those that are
in use, the hot ones, are copied into columns when they are first wanted, and a row of the stream
names the columns that are its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.groups import ModuleGroup

NOBODY = -1  # owner of the rows that no adapter touches
_FREE = -2  # owner of the columns that hold no adapter
LEAST_COLUMNS = 64  # of a pass with adapters


@dataclass(frozen=True, slots=True, eq=False)
class ActiveColumns:
    """What the layers apply in a pass: R columns of the bank."""

    own: Tensor  # [rows, R] whether a column belongs to a row's adapter
    scales: Tensor  # [R]
    a: Mapping[str, Tensor]  # by first module of the group, [at least R, modules, in]
    b: Mapping[str, Tensor]  # by module, [at least R, out]

    def add(self, x: Tensor, y: Tensor, group: ModuleGroup) -> None:
        """Adds to y [rows, width] what the adapters of the rows make of x [rows, in]."""
        columns = self.own.shape[1]
        a = self.a[group.modules[0]][:columns].flatten(0, 1)
        h = (x @ a.T).unflatten(1, (columns, -1)) * self.scales[:, None]  # [rows, R, modules]
        for member, (module, place) in enumerate(zip(group.modules, group.columns, strict=True)):
            # Cut out, not multiplied by 0: what others' columns make of a row may be infinite.
            own = torch.where(self.own, h[:, :, member], 0.0)
            y[:, place].addmm_(own, self.b[module][:columns])


class ColumnBank:
    """The hot adapters."""

    def __init__(
        self,
        groups: Sequence[ModuleGroup],
        size: int,  # columns
        device: torch.device,
        dtype: torch.dtype,  # that the base computes in
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(size, *shape, device=device, dtype=dtype)

        self._groups = groups
        self._size = size
        self._a = {g.modules[0]: zeros(len(g.modules), g.in_features) for g in groups}
        self._b = {
            module: zeros(out_features)
            for group in groups
            for module, out_features in zip(group.modules, group.out_features, strict=True)
        }
        self._owners = torch.full((size,), _FREE, device=device)
        self._scales = zeros()
        self._starts: dict[AdapterRow, int] = {}  # first column of each hot adapter
        # How many columns a pass may have: for each of these there is a graph.
        doubled = (LEAST_COLUMNS << power for power in range(size.bit_length()))
        self._steps = (0, *(columns for columns in doubled if columns < size), size)

    def admit(self, rows: Sequence[AdapterRow]) -> int | None:
        """Makes different adapters hot and returns how many columns a pass over them needs; None if
        they do not fit.
        """
        if sum(row.bank.stored_rank for row in rows) > self._size:
            return None
        kept = {row: self._starts[row] for row in rows if row in self._starts}
        if len(kept) < len(rows):
            places = self._placed(rows, kept) or self._placed(rows, {})
            assert places is not None, "there is room enough, in one piece or in several"
            self._move(places)
        stop = max((_stop(row, self._starts[row]) for row in rows), default=0)
        return next(columns for columns in self._steps if columns >= stop)

    def owner(self, row: AdapterRow | None) -> int:
        """By which a row of the stream names its adapter, which is hot."""
        return NOBODY if row is None else self._starts[row]

    def active(self, owners: Tensor, columns: int) -> ActiveColumns:  # owners [rows]
        """A pass over the first columns."""
        own = owners[:, None] == self._owners[:columns]
        return ActiveColumns(own, self._scales[:columns], self._a, self._b)

    def _placed(
        self, rows: Sequence[AdapterRow], kept: Mapping[AdapterRow, int]
    ) -> dict[AdapterRow, int] | None:
        """First columns for all, beside those that keep theirs; None if there is no gap for one.
        They lie as far to the left as they can: a pass covers all columns up to the last it needs.
        """
        places = dict(kept)
        for row in rows:
            if row not in places:
                start = _gap(places, row.bank.stored_rank)
                if start + row.bank.stored_rank > self._size:
                    return None
                places[row] = start
        return places

    def _move(self, places: Mapping[AdapterRow, int]) -> None:
        """Copies adapters to their places. Others stay hot where these leave them their columns."""
        for row, start in places.items():
            if self._starts.get(row) != start:
                self._copy(row, start)
        others = {
            row: start
            for row, start in self._starts.items()
            if row not in places
            and all(
                _stop(row, start) <= at or _stop(placed, at) <= start
                for placed, at in places.items()
            )
        }
        self._starts = {**others, **places}
        owners, scales = [_FREE] * self._size, [0.0] * self._size
        for row, start in self._starts.items():
            columns = slice(start, _stop(row, start))
            owners[columns] = [start] * row.bank.stored_rank
            scales[columns] = [row.spec.scale] * row.bank.stored_rank
        self._owners.copy_(torch.tensor(owners))
        self._scales.copy_(torch.tensor(scales))

    def _copy(self, row: AdapterRow, start: int) -> None:
        # In a product over all columns 0 times NaN reaches all rows. So of an adapter that is not
        # finite A is all NaN and B is 0: its own rows get NaN, and nobody else's.
        finite = row.part(Part.WEIGHTS).to(self._scales.dtype).isfinite().all()
        columns = slice(start, _stop(row, start))
        for group in self._groups:
            for member, module in enumerate(group.modules):
                a, b = row.views(Part.WEIGHTS, module)
                self._a[group.modules[0]][columns, member] = torch.where(finite, a, torch.nan)
                self._b[module][columns] = torch.where(finite, b.t(), 0.0)


def _gap(places: Mapping[AdapterRow, int], columns: int) -> int:
    """The first of as many columns that nobody has."""
    at = 0
    for row, start in sorted(places.items(), key=lambda item: item[1]):
        if start - at >= columns:
            break
        at = _stop(row, start)
    return at


def _stop(row: AdapterRow, start: int) -> int:
    return start + row.bank.stored_rank

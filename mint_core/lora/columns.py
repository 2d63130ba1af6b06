"""Adapters side by side in tensors that stay where they are, for passes of few rows in any order.

A captured CUDA graph reads the same memory at every replay, so adapters come to it: those that are
in use, the hot ones, are copied into columns when they are first wanted, and a row of the stream
names the columns that are its own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mint_core.lora import kernels
from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.groups import ModuleGroup

NOBODY = -1  # owner of the rows that no adapter touches
_FREE = -2  # owner of the columns that hold no adapter
LEAST_COLUMNS, MOST_COLUMNS = 64, 512  # of a pass with adapters
_BUSY = 66  # programs of a small pass, by which splits are chosen where no pass may choose them


class Columns:
    """The adapters of a group of modules, of all of the bank's columns: at first none."""

    def __init__(
        self,
        group: ModuleGroup,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        row_wise: bool = False,  # see `ColumnBank`
    ) -> None:
        modules = len(group.modules)
        # [modules, size, in]
        self.a = torch.zeros(modules, size, group.in_features, device=device, dtype=dtype)
        # [size * width], of each module [size, out]
        self.b = torch.zeros(size * group.width, device=device, dtype=dtype)
        parts = self.b.split([size * width for width in group.out_features])
        self.parts = [part.view(size, -1) for part in parts]  # of b, each [size, out]
        self.tiles: Tensor | None = None  # for the kernels; None where they do not run
        self.splits: int | None = None  # of theirs; None: as each pass has it
        if kernels.run_on(device):
            from mint_core.lora.column_kernels import output_tiles, splits_of  # not everywhere

            self.tiles = output_tiles(group.out_features, device)
            self.splits = splits_of(group.in_features, _BUSY) if row_wise else None


@dataclass(frozen=True, eq=False)
class ActiveColumns:
    """What the layers apply in a pass: R columns of the bank."""

    owners: Tensor  # [rows] which adapter each row's is
    column_owners: Tensor  # [R] which adapter each column is of
    scales: Tensor  # [R] float32
    groups: Mapping[str, Columns]  # by first module

    @cached_property
    def own(self) -> Tensor:  # [rows, R]
        """Whether a column belongs to a row's adapter."""
        return self.owners[:, None] == self.column_owners

    def add(self, x: Tensor, y: Tensor, group: ModuleGroup) -> None:
        """Adds to y [rows, width] what the adapters of the rows make of x [rows, in]."""
        columns = self.groups[group.modules[0]]
        if columns.tiles is None:
            self.add_slowly(x, y, group)
            return
        from mint_core.lora.column_kernels import add_own

        described = self.column_owners, self.scales
        add_own(x, y, columns.a, columns.b, self.owners, described, columns.tiles, columns.splits)

    def add_slowly(self, x: Tensor, y: Tensor, group: ModuleGroup) -> None:
        """Module after module; the oracle of the kernels."""
        columns, count = self.groups[group.modules[0]], len(self.scales)
        for a, b, place in zip(columns.a, columns.parts, group.columns, strict=True):
            h = (x @ a[:count].T) * self.scales  # [rows, R]
            # Cut out, not multiplied by 0: what others' columns make of a row may be infinite.
            y[:, place].addmm_(torch.where(self.own, h, 0.0).to(y.dtype), b[:count])


class ColumnBank:
    """The hot adapters. `row_wise`: what a row gets depends on no other, bit for bit; then adapters
    begin at tiles of their own, since in a tile the place of a column tells.
    """

    def __init__(
        self,
        groups: Sequence[ModuleGroup],
        size: int,  # columns
        device: torch.device,
        dtype: torch.dtype,  # that the base computes in
        *,
        row_wise: bool = False,
    ) -> None:
        self._step = kernels.TILE if row_wise else 1
        self._groups = groups
        self._size = size
        self._columns = {
            g.modules[0]: Columns(g, size, device, dtype, row_wise=row_wise) for g in groups
        }
        self._owners = torch.full((size,), _FREE, device=device)
        self._scales = torch.zeros(size, device=device)
        self._dtype = dtype
        self._starts: dict[AdapterRow, int] = {}  # first column of each hot adapter
        # How many columns a pass may have: for each of these there is a graph.
        doubled = (LEAST_COLUMNS << power for power in range(size.bit_length()))
        self._steps = (0, *(columns for columns in doubled if columns < size), size)

    def admit(self, rows: Sequence[AdapterRow]) -> int | None:
        """Makes different adapters hot and returns how many columns a pass over them needs; None if
        they do not fit.
        """
        if not self.fits(rows):
            return None
        kept = {row: self._starts[row] for row in rows if row in self._starts}
        if len(kept) < len(rows):
            places = self._placed(rows, kept) or self._placed(rows, {})
            assert places is not None, "there is room enough, in one piece or in several"
            self._move(places)
        stop = max((_stop(row, self._starts[row]) for row in rows), default=0)
        return next(columns for columns in self._steps if columns >= stop)

    def fits(self, rows: Collection[AdapterRow]) -> bool:
        """Whether different adapters can be hot at the same time."""
        return sum(map(self._room, rows)) <= self._size

    def _room(self, row: AdapterRow) -> int:
        """Columns that nobody else has then."""
        return -(-row.bank.stored_rank // self._step) * self._step

    def clear(self) -> None:
        """Has no adapter hot."""
        self._starts = {}
        self._owners.fill_(_FREE)

    def owner(self, row: AdapterRow | None) -> int:
        """By which a row of the stream names its adapter, which is hot."""
        return NOBODY if row is None else self._starts[row]

    def active(self, owners: Tensor, columns: int) -> ActiveColumns:  # owners [rows]
        """A pass over the first columns."""
        return ActiveColumns(owners, self._owners[:columns], self._scales[:columns], self._columns)

    def _placed(
        self, rows: Sequence[AdapterRow], kept: Mapping[AdapterRow, int]
    ) -> dict[AdapterRow, int] | None:
        """First columns for all, beside those that keep theirs; None if there is no gap for one.
        They lie as far to the left as they can: a pass covers all columns up to the last it needs.
        """
        places = dict(kept)
        for row in rows:
            if row not in places:
                start = self._gap(places, self._room(row))
                if start + self._room(row) > self._size:
                    return None
                places[row] = start
        return places

    def _gap(self, places: Mapping[AdapterRow, int], columns: int) -> int:
        """The first of as many columns that nobody has."""
        at = 0
        for row, start in sorted(places.items(), key=lambda item: item[1]):
            if start - at >= columns:
                break
            at = start + self._room(row)
        return at

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
        numbers = row.part(Part.WEIGHTS).to(self._dtype)
        if not numbers.isfinite().all():
            self._break(row, start)
            return
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for group in self._groups:
            own = row.bank.group_matrices(numbers, group, range(len(group.modules)))
            a, b = self._of(group, row, start)
            targets += [*a, *b]
            sources += own.each
        torch._foreach_copy_(targets, sources)

    def _break(self, row: AdapterRow, start: int) -> None:
        """In a product over all columns 0 times NaN reaches all rows. So of an adapter that is not
        finite A is all NaN and B is 0: its own rows get NaN, and nobody else's.
        """
        for group in self._groups:
            a, b = self._of(group, row, start)
            torch._foreach_mul_(a, torch.nan)
            torch._foreach_zero_(b)

    def _of(
        self, group: ModuleGroup, row: AdapterRow, start: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A [r, in] and B [r, out] of each module in the columns from `start` on."""
        columns, place = self._columns[group.modules[0]], slice(start, _stop(row, start))
        return [a[place] for a in columns.a], [b[place] for b in columns.parts]


def _stop(row: AdapterRow, start: int) -> int:
    return start + row.bank.stored_rank

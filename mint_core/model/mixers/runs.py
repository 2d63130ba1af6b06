"""Where sequences lie in a packed stream, for what mixes their tokens through a state.

Sequences never touch: each has margins of its own for a convolution, and chunks that begin where it
begins. How long its chunks are follows from its own length.

T: rows of the stream. D: runs. N: chunks of a group, each of C rows. R: rows of all chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Rows of a chunk: the least that holds a run, or the last. Multiples of 32: functions of as many
# numbers are computed in whole vectors on every CPU, and so have the same bits at every place.
CHUNK_ROWS = (32, 64)

_Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Margins:
    """The runs' rows, with so many rows before each run's first. P: rows and margins."""

    count: int  # P
    width: int  # rows of a margin
    covered: Tensor | None  # rows of the stream that are in a run; None: all, in order
    places: Tensor  # [covered] theirs
    before: Tensor  # [D * width] places of the margins
    last: Tensor  # [D * width] places of each run's last rows, margins included where it is short
    first: Tensor  # [T] place `width` before each row of the stream; 0 for rows of no run


@dataclass(frozen=True, slots=True, eq=False)
class ChunkGroup:
    """Chunks of C rows, step after step: the first of each run, then the second of those that have
    one, and so on. Runs with more chunks come first.
    """

    length: int  # C
    counts: tuple[int, ...]  # chunks of each step
    runs: Tensor  # [counts[0]] which runs those of the first step are
    fillers: Tensor | None  # [N, 1, C] bool, rows that only fill up, at the end of a run's last

    @property
    def rows(self) -> int:
        return self.length * sum(self.counts)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The runs' rows in another order than the stream's."""

    rows: Tensor  # [R] of the stream
    places: Tensor  # [T] of each row of the stream; some place for rows of no run
    fillers: Tensor | None  # [fillers] places that only fill up

    def take(self, x: Tensor) -> Tensor:  # [T, ...] -> [R, ...]
        """What fills up is some row of the same run; its gradient must be 0."""
        return _permuted(x, self.rows, self.places, None)

    def join(self, x: Tensor) -> Tensor:  # [R, ...] -> [T, ...]
        return _permuted(x, self.places, self.rows, self.fillers)


@dataclass(frozen=True, slots=True, eq=False)
class Chunks(Layout):
    """All runs' chunks."""

    groups: tuple[ChunkGroup, ...]
    order: Tensor  # [D] place of each run among the groups' runs, one group after the other


@dataclass(frozen=True, slots=True, eq=False)
class OneByOne(Layout):
    """Run after run."""

    bounds: Tensor  # [D + 1] int64, place of each run's first row, and R
    bounds_on_host: Tensor


class Runs:
    """Rows of a stream that belong together."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],  # first row, and one beyond the last; not empty
        rows: int,  # T; those in no span are computed with no meaning
        device: torch.device,
    ) -> None:
        bounds = np.array(spans, np.int64).reshape(-1, 2)
        self._starts, self._stops = bounds[:, 0], bounds[:, 1]
        self._lengths = self._stops - self._starts
        self._rows = rows
        self._device = device
        self._margins: dict[int, Margins] = {}

    def margins(self, width: int) -> Margins:
        """With margins of so many rows."""
        if width not in self._margins:
            self._margins[width] = self._with_margins(width)
        return self._margins[width]

    def _with_margins(self, width: int) -> Margins:
        lengths, count = self._lengths, len(self._lengths)
        # Where each run's margin begins.
        begins = np.cumsum(lengths) - lengths + width * np.arange(count)
        shift = np.repeat(begins + width - self._starts, lengths)
        covered = self._covered
        places = covered + shift
        first = np.zeros(self._rows, np.int64)
        first[covered] = places - width
        margin = np.arange(width)
        complete = np.array_equal(covered, np.arange(self._rows))
        return Margins(
            count=int(lengths.sum()) + count * width,
            width=width,
            covered=None if complete else self._tensor(covered),
            places=self._tensor(places),
            before=self._tensor((begins[:, None] + margin).ravel()),
            last=self._tensor(((begins + lengths)[:, None] + margin).ravel()),
            first=self._tensor(first),
        )

    @cached_property
    def _covered(self) -> _Indices:
        """Rows of the stream that are in a run."""
        offsets = np.arange(self._lengths.sum())
        before = np.cumsum(self._lengths) - self._lengths
        covered: _Indices = offsets + np.repeat(self._starts - before, self._lengths)
        return covered

    @cached_property
    def chunks(self) -> Chunks:
        groups, rows, real, order = [], [], [], []
        fits = np.searchsorted(CHUNK_ROWS[:-1], self._lengths)  # which length each run takes
        for number, length in enumerate(CHUNK_ROWS):
            own = np.flatnonzero(fits == number)
            if len(own):
                group, own_rows, own_real, runs = self._group(length, own)
                groups.append(group)
                rows.append(own_rows.ravel())
                real.append(own_real.ravel())
                order.append(runs)
        all_rows, all_runs = np.concatenate(rows), np.concatenate(order)
        all_real = np.concatenate(real)
        places = np.zeros(self._rows, np.int64)
        places[all_rows[all_real]] = np.flatnonzero(all_real)
        return Chunks(
            groups=tuple(groups),
            rows=self._tensor(all_rows),
            places=self._tensor(places),
            fillers=None if all_real.all() else self._tensor(np.flatnonzero(~all_real)),
            order=self._tensor(np.argsort(all_runs)),
        )

    @cached_property
    def one_by_one(self) -> OneByOne:
        rows = self._covered
        places = np.zeros(self._rows, np.int64)
        places[rows] = np.arange(len(rows))
        bounds = torch.from_numpy(np.concatenate([[0], self._lengths.cumsum()]))
        return OneByOne(
            rows=self._tensor(rows),
            places=self._tensor(places),
            fillers=None,
            bounds=bounds.to(self._device),
            bounds_on_host=bounds,
        )

    def _group(
        self, length: int, own: _Indices
    ) -> tuple[ChunkGroup, _Indices, NDArray[np.bool_], _Indices]:
        """The group, its rows of the stream and which of them do not only fill up, [N, C] each, and
        its runs.
        """
        sizes = -(-self._lengths[own] // length)
        longest_first = np.argsort(-sizes, kind="stable")
        runs, sizes = own[longest_first], sizes[longest_first]
        counts = [int((sizes > step).sum()) for step in range(sizes[0])]
        starts = np.concatenate(
            [self._starts[runs[:count]] + length * step for step, count in enumerate(counts)]
        )
        stops = np.concatenate([self._stops[runs[:count]] for count in counts])
        rows = starts[:, None] + np.arange(length)
        real = rows < stops[:, None]
        rows = np.where(real, rows, starts[:, None])
        fillers = None if real.all() else self._tensor(~real[:, None])
        group = ChunkGroup(length, tuple(counts), self._tensor(runs), fillers)
        return group, rows, real, runs

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _permuted(x: Tensor, index: Tensor, back: Tensor, fillers: Tensor | None) -> Tensor:
    """x[index], whose gradient is read at `back` but for what fills up."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Permutation.apply(x, index, back, fillers)  # type: ignore[no-untyped-call]
        return result
    return x.index_select(0, index)


class _Permutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, fillers: Tensor | None) -> Tensor:
        ctx.back, ctx.fillers = back, fillers
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].index_select(0, ctx.back)
        if ctx.fillers is not None:
            gradient.index_fill_(0, ctx.fillers, 0.0)
        return gradient, None, None, None

"""Where adapters live: one row per adapter, in as many parts as are used of it.

A part is a vector [params] that holds A [rank, in] and B, transposed, [rank, out], of every linear
layer that LoRA can train: group after group, of each first all A, so that they are one matrix, then
all B. Ranks are padded to a multiple of 8, and a module that an adapter does not train stays zero;
the padding contributes exact zeros everywhere, gradients and Adam included. Publishing, loading,
stepping, moving elsewhere are operations on a row.

A part takes memory from its first use until it is freed. Rows are not slots of one matrix: that
would have to be copied to grow, could not shrink, and would hold moments of runs without a step.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mint_core.lora.groups import ModuleGroup
from mint_core.lora.row_layout import Matrix, RowLayout, no_such_layer
from mint_core.lora.spec import AdapterArrays, AdapterSpec, stored_rank


class Part(StrEnum):  # hashes faster than a plain Enum: parts are looked up for every product
    """What is kept of an adapter. A sampler keeps weights alone."""

    WEIGHTS = "weights"
    GRADIENT = "gradient"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"


@dataclass(frozen=True, slots=True, eq=False)
class GroupMatrices:
    """A and B of the modules of a group, from the first to the last that an adapter trains: one
    between them that it does not is zero.
    """

    members: range  # places in the group
    ranks: list[int]  # r of each
    a: Tensor  # [k r, in], one below the other
    a_t: Tensor  # [in, k r]
    b: tuple[Tensor, ...]  # each [out, r]
    b_t: tuple[Tensor, ...]  # each [r, out]

    @property
    def each(self) -> list[Tensor]:
        """A [r, in] of each module, then B [r, out], transposed, of each."""
        return [*self.a.split(self.ranks), *self.b_t]


class RankBank:
    """How the rows of one rank class are laid out."""

    def __init__(self, stored_rank: int, groups: Sequence[ModuleGroup]) -> None:
        self.stored_rank = stored_rank
        self._groups = groups
        # Of each module, A [stored rank, in] and B [out, stored rank]. B lies transposed: products
        # with 8 columns of the inner side take CPUs about twice as long.
        self.places: dict[str, tuple[Matrix, Matrix]] = {}
        self.row_size = 0
        for group in groups:
            width, at_a = group.in_features, self.row_size
            at_b = at_a + stored_rank * width * len(group.modules)
            for module, out in zip(group.modules, group.out_features, strict=True):
                a = Matrix(at_a, stored_rank, width, width, 1)
                self.places[module] = a, Matrix(at_b, out, stored_rank, 1, out)
                at_a += stored_rank * width
                at_b += stored_rank * out
            self.row_size = at_b

    @property
    def part_bytes(self) -> int:
        """Memory of one part of a row."""
        return 4 * self.row_size

    def unit(self, group: ModuleGroup) -> int:
        """Where a group begins in a row, over the stored rank: the same in all banks."""
        return self.places[group.modules[0]][0].offset // self.stored_rank

    def matrices(self, row: Tensor, module: str) -> tuple[Tensor, Tensor]:
        """A [stored rank, in] and B [out, stored rank] of a module, as views of [params]."""
        return self._a(row, module, 1), self._b_t(row, module).mT

    def group_matrices(self, row: Tensor, group: ModuleGroup, members: range) -> GroupMatrices:
        """Of neighbours in a group, as views of [params], or of several rows, [rows, params]."""
        modules = [group.modules[member] for member in members]
        a = self._a(row, modules[0], len(modules))
        b_t = tuple(self._b_t(row, module) for module in modules)
        b = tuple(matrix.mT for matrix in b_t)
        return GroupMatrices(members, [self.stored_rank] * len(modules), a, a.mT, b, b_t)

    def take(self, row: Tensor, other: Tensor, bank: "RankBank") -> None:
        """Copies a row of a bank of the same groups, which is as wide or less, to a row of this
        one, which is zero; both [params].
        """
        if bank is self:
            row.copy_(other)
            return
        other = other.to(row.dtype)
        for group in self._groups:
            members = range(len(group.modules))
            own = bank.group_matrices(other, group, members).each
            wide = self.group_matrices(row, group, members).each
            torch._foreach_copy_([w[: len(o)] for w, o in zip(wide, own, strict=True)], own)

    @cached_property
    def layout(self) -> RowLayout:
        """What `matrices` does, for those who have no bank."""
        return RowLayout.of(self.row_size, self.places)

    def _a(self, row: Tensor, first: str, count: int) -> Tensor:  # [..., count r, in]
        place = self.places[first][0]
        return _matrix_at(row, place.offset, count * place.rows, place.columns)

    def _b_t(self, row: Tensor, module: str) -> Tensor:  # [..., r, out]
        place = self.places[module][1]
        return _matrix_at(row, place.offset, place.columns, place.rows)


class AdapterRow:
    """One adapter. Parts may be away: then they are kept elsewhere and must not be asked for."""

    def __init__(self, spec: AdapterSpec, bank: RankBank, device: torch.device) -> None:
        self.spec = spec
        self.bank = bank
        self.modules = frozenset(spec.modules)
        self._device = device
        self._parts: dict[Part, Tensor] = {}
        self._groups: dict[tuple[Part, str], GroupMatrices] = {}
        self._away: set[Part] = set()
        self.version = 0  # changes when weights are loaded

    @property
    def held(self) -> Mapping[Part, Tensor]:
        """The parts that take memory here."""
        return self._parts

    def part(self, part: Part) -> Tensor:  # [params]
        """A part; zero when it is first asked for."""
        assert part not in self._away, "a row was used while it was away"
        if part not in self._parts:
            self._parts[part] = zero_vector(self.bank.row_size, self._device)
        return self._parts[part]

    def trains(self, group: ModuleGroup) -> bool:
        """Whether the adapter has a module in the group."""
        return not self.modules.isdisjoint(group.modules)

    def group(self, part: Part, group: ModuleGroup) -> GroupMatrices:
        """A and B of a group of which the adapter trains something."""
        key = (part, group.modules[0])
        if key not in self._groups:
            places = [i for i, module in enumerate(group.modules) if module in self.modules]
            members = range(places[0], places[-1] + 1)
            self._groups[key] = self.bank.group_matrices(self.part(part), group, members)
        return self._groups[key]

    def free(self, part: Part) -> None:
        """Makes a part zero by giving its memory back."""
        self._away.discard(part)
        self._parts.pop(part, None)
        self._groups = {key: views for key, views in self._groups.items() if key[0] is not part}

    def leave(self, *parts: Part) -> None:
        """Gives memory back, of all parts if none is named; who calls this has copied what is
        needed of `held`.
        """
        for part in parts or Part:
            self.free(part)
            self._away.add(part)

    def come_back(self, parts: Mapping[Part, Tensor]) -> None:
        """Takes parts that were kept, wherever they lie now."""
        for part, vector in parts.items():
            self._parts[part] = vector.to(self._device)
            self._away.discard(part)

    def load(self, part: Part, arrays: AdapterArrays) -> None:
        """Replaces a part by arrays of the adapter's modules, all finite. Raises InvalidRequest
        where a shape is not that of its layer.
        """
        row = self.bank.layout.row(self.spec, arrays)
        self.version += 1
        self.part(part).copy_(torch.from_numpy(row))

    def export(self, part: Part) -> dict[str, np.ndarray]:
        """Copies a part, padding removed, under PEFT's names."""
        assert part not in self._away, "a row was used while it was away"
        vector = self._parts.get(part)
        if vector is None:
            vector = torch.zeros(self.bank.row_size)
        matrices = self.bank.layout.matrices(vector.numpy(force=True), self.spec)
        return {name: matrix.copy() for name, matrix in matrices.items()}

    def parameter_count(self) -> int:
        """How many numbers the adapter has, padding not counted."""
        places = [self.bank.places[module] for module in self.modules]
        return self.spec.rank * sum(a.columns + b.rows for a, b in places)


class AdapterBank:
    """All rank classes of one engine."""

    def __init__(self, groups: Sequence[ModuleGroup], device: torch.device) -> None:
        self._groups = groups
        self._device = device
        self._classes: dict[int, RankBank] = {}

    def rank_class(self, rank: int) -> RankBank:
        """The class in which adapters of a rank are stored."""
        stored = stored_rank(rank)
        if stored not in self._classes:
            self._classes[stored] = RankBank(stored, self._groups)
        return self._classes[stored]

    def add(self, spec: AdapterSpec) -> AdapterRow:
        """A row for an adapter, zero in every part."""
        bank = self.rank_class(spec.rank)
        if unknown := sorted(set(spec.modules) - bank.places.keys()):
            raise no_such_layer(unknown[0])
        return AdapterRow(spec, bank, self._device)


def _matrix_at(row: Tensor, start: int, rows: int, columns: int) -> Tensor:
    return row[..., start : start + rows * columns].view(*row.shape[:-1], rows, columns)


def zero_vector(size: int, device: torch.device) -> Tensor:  # [size]
    """Zeros. On a CPU in pages of their own, which the system gets back with the tensor: the heap
    keeps what lies between other blocks, and rows that come and go leave holes in it.
    """
    if device.type != "cpu":
        return torch.zeros(size, device=device)
    pages = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.float32)

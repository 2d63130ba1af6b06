"""Where adapters live: one row per adapter, in as many parts as its bank keeps of it.

A part is a vector [params] that holds A [rank, in] and B, transposed, [rank, out], of every linear
layer that LoRA can train, one after the other. Ranks are padded to a multiple of 8, and a module
that an adapter does not train stays zero; the padding contributes exact zeros everywhere, gradients
and Adam included. Publishing, loading, stepping, moving elsewhere are operations on a row.

A part takes memory from its first use until it is freed. Rows are not slots of one matrix: that
would have to be copied to grow, could not shrink, and would hold moments of runs without a step.
"""

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mint_core.errors import InvalidRequest
from mint_core.lora.row_layout import Matrix, RowLayout
from mint_core.lora.spec import AdapterArrays, AdapterSpec, lora_a_name, lora_b_name, stored_rank


class Part(StrEnum):  # hashes faster than a plain Enum: parts are looked up for every product
    """What is kept of an adapter. A sampler keeps weights alone."""

    WEIGHTS = "weights"
    GRADIENT = "gradient"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"


TRAINING_PARTS = tuple(Part)
SAMPLING_PARTS = (Part.WEIGHTS,)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Of an nn.Linear."""

    in_features: int
    out_features: int


class RankBank:
    """How the rows of one rank class are laid out."""

    def __init__(
        self, stored_rank: int, shapes: Mapping[str, LinearShape], parts: tuple[Part, ...]
    ) -> None:
        self.stored_rank = stored_rank
        self.parts = parts
        self._shapes = shapes
        self._offsets: dict[str, int] = {}
        self.row_size = 0
        for module, shape in shapes.items():
            self._offsets[module] = self.row_size
            self.row_size += stored_rank * (shape.in_features + shape.out_features)

    @property
    def part_bytes(self) -> int:
        """Memory of one part of a row."""
        return 4 * self.row_size

    def matrices(self, row: Tensor, module: str) -> tuple[Tensor, Tensor]:
        """A [stored rank, in] and B [out, stored rank] of a module, as views of [params]."""
        shape, rank, start = self._shapes[module], self.stored_rank, self._offsets[module]
        middle = start + rank * shape.in_features
        stop = middle + rank * shape.out_features
        return (
            row[start:middle].view(rank, shape.in_features),
            # Stored the other way round: products with 8 columns of the inner side take CPUs about
            # twice as long.
            row[middle:stop].view(rank, shape.out_features).t(),
        )

    @cached_property
    def layout(self) -> RowLayout:
        """What `matrices` does, for those who have no bank."""
        row = torch.empty(self.row_size, device="meta")
        places = {}
        for module in self._shapes:
            a, b = self.matrices(row, module)
            places[module] = (_place(a), _place(b))
        return RowLayout.of(self.row_size, places)

    def parameter_count(self, rank: int, modules: Iterable[str]) -> int:
        """How many numbers an adapter has, padding not counted."""
        shapes = [self._shapes[module] for module in modules]
        return rank * sum(shape.in_features + shape.out_features for shape in shapes)


class AdapterRow:
    """One adapter. It may be away: then its parts are kept elsewhere and must not be asked for."""

    def __init__(self, spec: AdapterSpec, bank: RankBank, device: torch.device) -> None:
        self.spec = spec
        self.bank = bank
        self.modules = frozenset(spec.modules)
        self._device = device
        self._parts: dict[Part, Tensor] = {}
        self._views: dict[tuple[Part, str], tuple[Tensor, Tensor]] = {}
        self._away = False

    @property
    def held(self) -> Mapping[Part, Tensor]:
        """The parts that take memory here."""
        return self._parts

    def part(self, part: Part) -> Tensor:  # [params]
        """A part; zero when it is first asked for."""
        assert not self._away, "a row was used while it was away"
        if part not in self._parts:
            assert part in self.bank.parts, f"this bank keeps no {part.value}"
            self._parts[part] = zero_vector(self.bank.row_size, self._device)
        return self._parts[part]

    def views(self, part: Part, module: str) -> tuple[Tensor, Tensor]:
        """A [stored rank, in] and B [out, stored rank]."""
        key = (part, module)
        if key not in self._views:
            self._views[key] = self.bank.matrices(self.part(part), module)
        return self._views[key]

    def free(self, part: Part) -> None:
        """Makes a part zero by giving its memory back."""
        self._parts.pop(part, None)
        self._views = {key: views for key, views in self._views.items() if key[0] is not part}

    def leave(self) -> None:
        """Gives all memory back; who calls this has copied what is needed of `held`."""
        self._parts.clear()
        self._views.clear()
        self._away = True

    def come_back(self, parts: Mapping[Part, Tensor]) -> None:
        """Takes the parts that were kept, wherever they lie now; others are zero."""
        self._parts = {part: vector.to(self._device) for part, vector in parts.items()}
        self._away = False

    def load(self, part: Part, arrays: AdapterArrays) -> None:
        """Replaces a part. Names and shapes must be the adapter's own, values finite."""
        wanted = {
            name for module in self.modules for name in (lora_a_name(module), lora_b_name(module))
        }
        if wanted != set(arrays):
            odd = sorted(wanted ^ set(arrays))[0]
            raise InvalidRequest(
                f"the adapter's tensors are not those of its configuration: `{odd}` is missing or "
                "unexpected",
                tensor=odd,
            )
        checked = [
            (matrix, array)
            for module in self.modules
            for matrix, array in zip(
                self._trim(*self.views(part, module)), _pair(arrays, module), strict=True
            )
        ]
        for matrix, array in checked:
            _check(matrix, array)
        self.part(part).zero_()
        for matrix, array in checked:
            matrix.copy_(torch.from_numpy(np.array(array, dtype=np.float32)))

    def export(self, part: Part) -> dict[str, np.ndarray]:
        """Copies a part, padding removed, under PEFT's names."""
        assert not self._away, "a row was used while it was away"
        vector = self._parts.get(part)
        if vector is None:
            vector = torch.zeros(self.bank.row_size)
        arrays = {}
        for module in sorted(self.modules):
            a, b = self._trim(*self.bank.matrices(vector, module))
            arrays[lora_a_name(module)] = a.to("cpu", copy=True).contiguous().numpy()
            arrays[lora_b_name(module)] = b.to("cpu", copy=True).contiguous().numpy()
        return arrays

    def parameter_count(self) -> int:
        """How many numbers the adapter has, padding not counted."""
        return self.bank.parameter_count(self.spec.rank, self.modules)

    def _trim(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B without padding."""
        return a[: self.spec.rank], b[:, : self.spec.rank]


class AdapterBank:
    """All rank classes of one engine."""

    def __init__(
        self, shapes: Mapping[str, LinearShape], parts: tuple[Part, ...], device: torch.device
    ) -> None:
        self._shapes = shapes
        self._parts = parts
        self._device = device
        self._classes: dict[int, RankBank] = {}

    def rank_class(self, rank: int) -> RankBank:
        """The class in which adapters of a rank are stored."""
        stored = stored_rank(rank)
        if stored not in self._classes:
            self._classes[stored] = RankBank(stored, self._shapes, self._parts)
        return self._classes[stored]

    def add(self, spec: AdapterSpec) -> AdapterRow:
        """A row for an adapter, zero in every part."""
        unknown = sorted(set(spec.modules) - set(self._shapes))
        if unknown:
            raise InvalidRequest(
                f"the base model has no linear layer `{unknown[0]}`; the adapter belongs to "
                "another model",
                module=unknown[0],
            )
        return AdapterRow(spec, self.rank_class(spec.rank), self._device)

    def remove(self, row: AdapterRow) -> None:
        """Gives the row's memory back."""
        row.leave()


def zero_vector(size: int, device: torch.device) -> Tensor:  # [size]
    """Zeros. On a CPU in pages of their own, which the system gets back with the tensor: the heap
    keeps what lies between other blocks, and rows that come and go leave holes in it.
    """
    if device.type != "cpu":
        return torch.zeros(size, device=device)
    pages = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.float32)


def _place(view: Tensor) -> Matrix:
    """Where a matrix lies in the row of which it is a view."""
    rows, columns = view.shape
    return Matrix(int(view.storage_offset()), (rows, columns), (view.stride(0), view.stride(1)))


def _pair(arrays: AdapterArrays, module: str) -> tuple[np.ndarray, np.ndarray]:
    return arrays[lora_a_name(module)], arrays[lora_b_name(module)]


def _check(matrix: Tensor, array: np.ndarray) -> None:
    if tuple(matrix.shape) != array.shape:
        raise InvalidRequest(
            f"an adapter tensor has shape {list(array.shape)} but its layer needs "
            f"{list(matrix.shape)}"
        )
    if not np.isfinite(array).all():
        raise InvalidRequest("an adapter tensor holds NaN or Inf; adapters must be finite")

"""Where adapters live: one matrix [slots, params] per rank class, one row per adapter.

A row holds A [rank, in] and B, transposed, [rank, out], of every linear layer that LoRA can train,
one after the other. Ranks are padded to a multiple of 8, and a module that an adapter does not
train stays zero; the padding contributes exact zeros everywhere, gradients and Adam included.
Publishing, loading, stepping are operations on a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from mint_core.errors import InvalidRequest
from mint_core.lora.spec import AdapterArrays, AdapterSpec, lora_a_name, lora_b_name

RANK_STEP = 8  # ranks are stored as multiples of it


class Part(Enum):
    """The matrices of a bank. A sampler's has weights alone."""

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
    """The rows of one rank class."""

    def __init__(
        self,
        stored_rank: int,
        shapes: Mapping[str, LinearShape],
        parts: tuple[Part, ...],
        device: torch.device,
    ) -> None:
        self.stored_rank = stored_rank
        self._shapes = shapes
        self._device = device
        self._offsets: dict[str, int] = {}
        offset = 0
        for module, shape in shapes.items():
            self._offsets[module] = offset
            offset += stored_rank * (shape.in_features + shape.out_features)
        self.row_size = offset
        self._matrices = {part: torch.zeros(0, offset, device=device) for part in parts}
        self._free: list[int] = []
        self._views: dict[tuple[Part, int, str], tuple[Tensor, Tensor]] = {}

    def allocate(self) -> int:
        """Takes a slot; its row is zero in every part."""
        if not self._free:
            self._grow()
        return self._free.pop()

    def release(self, slot: int) -> None:
        for matrix in self._matrices.values():
            matrix[slot].zero_()
        self._free.append(slot)

    def row(self, part: Part, slot: int) -> Tensor:  # [params]
        return self._matrices[part][slot]

    def views(self, part: Part, slot: int, module: str) -> tuple[Tensor, Tensor]:
        """A [stored rank, in] and B [out, stored rank] of a module, as views of the row."""
        key = (part, slot, module)
        if key not in self._views:
            shape, rank, start = self._shapes[module], self.stored_rank, self._offsets[module]
            row = self.row(part, slot)
            middle = start + rank * shape.in_features
            stop = middle + rank * shape.out_features
            self._views[key] = (
                row[start:middle].view(rank, shape.in_features),
                # Stored the other way round: products with 8 columns of the inner side take
                # CPUs about twice as long.
                row[middle:stop].view(rank, shape.out_features).t(),
            )
        return self._views[key]

    def _grow(self) -> None:
        slots = next(iter(self._matrices.values())).shape[0]
        more = max(1, slots // 2)
        for part, matrix in self._matrices.items():
            grown = torch.zeros(slots + more, self.row_size, device=self._device)
            grown[:slots] = matrix
            self._matrices[part] = grown
        self._views.clear()
        self._free.extend(reversed(range(slots, slots + more)))


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRow:
    """One adapter in its bank."""

    spec: AdapterSpec
    bank: RankBank
    slot: int
    modules: frozenset[str]

    def part(self, part: Part) -> Tensor:  # [params]
        return self.bank.row(part, self.slot)

    def views(self, part: Part, module: str) -> tuple[Tensor, Tensor]:
        """A [stored rank, in] and B [out, stored rank]."""
        return self.bank.views(part, self.slot, module)

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
                self._trimmed(part, module), _pair(arrays, module), strict=True
            )
        ]
        for matrix, array in checked:
            _check(matrix, array)
        self.part(part).zero_()
        for matrix, array in checked:
            matrix.copy_(torch.from_numpy(np.array(array, dtype=np.float32)))

    def export(self, part: Part) -> dict[str, np.ndarray]:
        """Copies a part, padding removed, under PEFT's names."""
        arrays = {}
        for module in sorted(self.modules):
            a, b = self._trimmed(part, module)
            arrays[lora_a_name(module)] = a.to("cpu", copy=True).contiguous().numpy()
            arrays[lora_b_name(module)] = b.to("cpu", copy=True).contiguous().numpy()
        return arrays

    def parameter_count(self) -> int:
        """How many numbers the adapter has, padding not counted."""
        return sum(
            matrix.numel()
            for module in self.modules
            for matrix in self._trimmed(Part.WEIGHTS, module)
        )

    def _trimmed(self, part: Part, module: str) -> tuple[Tensor, Tensor]:
        a, b = self.views(part, module)
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

    def add(self, spec: AdapterSpec) -> AdapterRow:
        """A zero row for an adapter."""
        unknown = sorted(set(spec.modules) - set(self._shapes))
        if unknown:
            raise InvalidRequest(
                f"the base model has no linear layer `{unknown[0]}`; the adapter belongs to "
                "another model",
                module=unknown[0],
            )
        stored_rank = -(-spec.rank // RANK_STEP) * RANK_STEP
        if stored_rank not in self._classes:
            self._classes[stored_rank] = RankBank(
                stored_rank, self._shapes, self._parts, self._device
            )
        bank = self._classes[stored_rank]
        return AdapterRow(spec, bank, bank.allocate(), frozenset(spec.modules))

    def remove(self, row: AdapterRow) -> None:
        row.bank.release(row.slot)


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

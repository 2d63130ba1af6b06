"""What the kernels of `segment_kernels.py` are told of a pass and of a group, as numbers on the
device: adapters by the addresses of their rows, so that nothing of them is copied together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.segments import Segment

ROWS = 32  # of a tile
OUTPUTS = 128  # of a tile of outputs


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The segments of a pass, all with a row, each adapter's together. Those of a recorded pass
    have room for more: adapters of rank 0, and tiles of such a one, which do nothing.
    """

    # Of each: addresses of weights and gradient (0: none), stored rank, first tile, tiles.
    adapters: Tensor  # [adapters, 5]
    # Of each: adapter, first row, end, whether what is added goes to the gradient now.
    tiles: Tensor  # [tiles, 4]
    scales: Tensor  # [adapters] float32
    most_rank: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Tables":
        own = Told(segments)
        # One copy to the device for both.
        numbers = torch.tensor([n for line in (*own.adapters, *own.tiles) for n in line])
        numbers = numbers.to(device, non_blocking=True)
        cut = 5 * len(own.adapters)
        scales = torch.tensor(own.scales).to(device, non_blocking=True)
        return cls(numbers[:cut].view(-1, 5), numbers[cut:].view(-1, 4), scales, own.most_rank)


class Told:
    """What tables hold, as numbers."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        by_row: dict[tuple[AdapterRow, bool], list[Segment]] = {}
        for segment in segments:
            assert segment.row is not None
            by_row.setdefault((segment.row, segment.accumulate), []).append(segment)
        self.most_rank = max(row.bank.stored_rank for row, _ in by_row)
        self.scales = [row.spec.scale for row, _ in by_row]
        self.adapters: list[list[int]] = []
        self.tiles: list[list[int]] = []
        for (row, trains), own in by_row.items():
            mine = [tile for segment in own for tile in _tiles(len(self.adapters), segment)]
            parts = (Part.WEIGHTS, Part.GRADIENT) if trains else (Part.WEIGHTS,)
            addresses = [row.part(part).data_ptr() for part in parts]
            place = row.bank.stored_rank, len(self.tiles), len(mine)
            self.adapters.append([*addresses, *[0] * (2 - len(parts)), *place])
            self.tiles += mine


def _tiles(adapter: int, segment: Segment) -> list[list[int]]:
    starts = range(segment.start, segment.stop, ROWS)
    tiles = [[adapter, start, min(start + ROWS, segment.stop), 0] for start in starts]
    tiles[-1][3] = 1
    return tiles


class GroupTables:
    """The modules of a group: where each one's columns and matrices are. Places are those of a row
    of rank 1 behind `unit`, where the group begins in it: the bank stores A, [m r, in], then each
    module's B, transposed, [r, out].
    """

    def __init__(self, group: ModuleGroup, unit: int, device: torch.device) -> None:
        width, modules = group.in_features, len(group.modules)
        starts = [columns.start for columns in group.columns]
        behind_a = width * modules
        self.unit = unit
        self.modules = modules
        # Of each module: first column of what is read, how many, place of the matrix.
        self.sides = _on(device, [(0, width, i * width) for i in range(modules)])
        sized = list(zip(starts, group.out_features, strict=True))
        self.back_sides = _on(device, [(s, out, behind_a + s) for s, out in sized])
        # Of each tile of outputs: its first column, first and end of those of its matrix, the
        # matrix's place, and the module.
        outputs = [_cut(s, s + out, behind_a + s, i) for i, (s, out) in enumerate(sized)]
        self.outputs = _on(device, [tile for tiles in outputs for tile in tiles])
        self.inputs = _on(device, _cut(0, width, 0, 0))  # all modules' A are one matrix


@lru_cache(maxsize=4096)  # of all groups of the models of a process
def group_tables(group: ModuleGroup, unit: int, device: torch.device) -> GroupTables:
    return GroupTables(group, unit, device)


def _cut(start: int, stop: int, place: int, member: int) -> list[tuple[int, ...]]:
    return [(at, start, stop, place, member) for at in range(start, stop, OUTPUTS)]


def _on(device: torch.device, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, device=device)

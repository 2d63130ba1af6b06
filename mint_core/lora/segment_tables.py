"""What the kernels of `segment_kernels.py` are told of a pass and of a group, as numbers on the
device: adapters by the addresses of their rows, so that nothing of them is copied together.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.segments import Segment

ROWS = 32  # of a tile
OUTPUTS = 128  # of a tile of outputs


class Tables:
    """The segments of a pass, all with a row, each adapter's together."""

    def __init__(
        self,
        segments: Sequence[Segment],
        weights_of: Callable[[AdapterRow], Tensor],  # [params] in the type of the pass
        device: torch.device,
    ) -> None:
        by_row: dict[tuple[AdapterRow, bool], list[Segment]] = {}
        for segment in segments:
            assert segment.row is not None
            by_row.setdefault((segment.row, segment.accumulate), []).append(segment)
        self.kept = [weights_of(row) for row, _ in by_row]  # while their addresses are in use
        self.most_rank = max(row.bank.stored_rank for row, _ in by_row)
        adapters: list[list[int]] = []
        tiles: list[list[int]] = []
        for ((row, trains), own), weights in zip(by_row.items(), self.kept, strict=True):
            mine = [tile for segment in own for tile in _tiles(len(adapters), segment)]
            gradient = row.part(Part.GRADIENT).data_ptr() if trains else 0
            place = len(tiles), len(mine)
            adapters.append([weights.data_ptr(), gradient, row.bank.stored_rank, *place])
            tiles += mine
        # One copy to the device for both.
        numbers = torch.tensor([n for line in (*adapters, *tiles) for n in line])
        numbers = numbers.to(device, non_blocking=True)
        cut = 5 * len(adapters)
        # Of each: addresses of weights and gradient (0: none), stored rank, first tile, tiles.
        self.adapters = numbers[:cut].view(-1, 5)
        # Of each: adapter, first row, end, whether what is added goes to the gradient now.
        self.tiles = numbers[cut:].view(-1, 4)
        scales = torch.tensor([row.spec.scale for row, _ in by_row])
        self.scales = scales.to(device, non_blocking=True)


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

"""The kernels for adapters of a training pass against the loop over segments, their oracle. Without
a GPU they run in Triton's interpreter.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mint_core.lora.bank import AdapterBank, AdapterRow, Part
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.segments import Segment
from mint_core.lora.spec import AdapterSpec
from tests.interpreted_kernels import DEVICE

from mint_core.lora.algorithms import (  # isort: skip  # after interpreted_kernels
    KERNELS,
    LOOP,
    Adapted,
    Algorithm,
    Gradients,
)

# Widths that no tile divides; the second does not begin the row.
GROUPS = (ModuleGroup(("q", "k", "v"), 70, (40, 134, 6)), ModuleGroup(("o",), 134, (70,)))
TOKENS = 110
RANKS = (8, 3, 40)


def make_rows(modules: Sequence[str] = ("q", "k", "v", "o")) -> list[AdapterRow]:
    bank = AdapterBank(GROUPS, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    rows = []
    for rank in RANKS:
        spec = AdapterSpec(rank=rank, alpha=7, use_rslora=False, seed=0, modules=tuple(modules))
        row = bank.add(spec)
        for module in modules:
            for matrix in row.bank.matrices(row.part(Part.WEIGHTS), module):
                matrix.normal_(0.0, 0.1, generator=generator)
        rows.append(row)
    return rows


def make_segments(rows: Sequence[AdapterRow]) -> tuple[Segment, ...]:
    """A run twice in a pass, rows of the base alone between, and one that only goes forward."""
    return (
        Segment(2, 40, rows[0], accumulate=True),
        Segment(40, 45, rows[1], accumulate=True),
        Segment(50, 87, rows[0], accumulate=True),
        Segment(87, 95, rows[0]),
        Segment(95, 109, rows[2], accumulate=True),
    )


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def run(
    algorithm: Algorithm, group: ModuleGroup, rows: Sequence[AdapterRow], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, dx, and the gradient of each row."""
    for row in rows:
        row.part(Part.GRADIENT).fill_(0.5)
    adapted = Adapted(make_segments(rows), DEVICE, dtype)
    x = drawn(TOKENS, group.in_features, dtype=dtype)
    y, dy = (drawn(TOKENS + i, group.width, dtype=dtype)[i:] for i in (0, 1))
    dx = drawn(TOKENS + 2, group.in_features, dtype=dtype)[2:]
    saved = algorithm.forward(x, y.split(group.out_features, 1), adapted, group)
    gradients = Gradients(x, dy.split(group.out_features, 1), dx)
    algorithm.backward(gradients, saved, adapted, group)
    return y, dx, [row.part(Part.GRADIENT) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS)
def test_each_segment_gets_what_the_loop_gives_it(group: ModuleGroup, dtype: torch.dtype) -> None:
    y, dx, gradients = run(KERNELS, group, make_rows(), dtype)
    expected_y, expected_dx, expected = run(LOOP, group, make_rows(), dtype)
    limit = 1e-5 if dtype == torch.float32 else 2**-5
    for ours, theirs in (
        (y, expected_y),
        (dx, expected_dx),
        *zip(gradients, expected, strict=True),
    ):
        assert (ours - theirs).abs().max() <= limit * theirs.abs().max()
    untouched = [0, 1, 45, 49, 109]
    assert torch.equal(y[untouched], expected_y[untouched])


def test_what_an_adapter_does_not_train_stays_zero() -> None:
    rows = make_rows(("k", "o"))
    _, _, gradients = run(KERNELS, GROUPS[0], rows, torch.float32)
    for row, gradient in zip(rows, gradients, strict=True):
        for module in ("q", "v"):
            for matrix in row.bank.matrices(gradient, module):
                assert (matrix == 0.5).all()  # as it was


def test_neighbours_change_no_bit() -> None:
    group, rows = GROUPS[0], make_rows()
    y, dx, gradients = run(KERNELS, group, rows, torch.float32)
    alone = make_rows()
    segments = tuple(s for s in make_segments(alone) if s.row is alone[0])
    alone[0].part(Part.GRADIENT).fill_(0.5)
    adapted = Adapted(segments, DEVICE, torch.float32)
    x = drawn(TOKENS, group.in_features, dtype=torch.float32)
    own_y, dy = (drawn(TOKENS + i, group.width, dtype=torch.float32)[i:] for i in (0, 1))
    own_dx = drawn(TOKENS + 2, group.in_features, dtype=torch.float32)[2:]
    saved = KERNELS.forward(x, own_y.split(group.out_features, 1), adapted, group)
    KERNELS.backward(Gradients(x, dy.split(group.out_features, 1), own_dx), saved, adapted, group)
    assert torch.equal(own_y[2:40], y[2:40])
    assert torch.equal(own_dx[50:95], dx[50:95])
    assert torch.equal(alone[0].part(Part.GRADIENT), gradients[0])


def test_an_adapter_that_is_not_finite_reaches_its_own_rows_alone() -> None:
    group = GROUPS[0]
    clean, _, _ = run(KERNELS, group, make_rows(), torch.float32)
    rows = make_rows()
    rows[1].part(Part.WEIGHTS)[-1] = torch.nan  # of the group behind
    rows[1].part(Part.WEIGHTS)[0] = torch.nan
    broken, _, gradients = run(KERNELS, group, rows, torch.float32)
    assert broken[40:45].isnan().any()
    others = [*range(40), *range(45, TOKENS)]
    assert torch.equal(broken[others], clean[others])
    assert gradients[0].isfinite().all()
    assert gradients[2].isfinite().all()

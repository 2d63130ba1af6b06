"""The kernels for adapters in columns against their oracle. Without a GPU they run in Triton's
interpreter.
"""

import itertools

import pytest
import torch
from torch import Tensor

from mint_core.lora.bank import AdapterBank, AdapterRow, Part
from mint_core.lora.columns import ActiveColumns, ColumnBank
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.kernels import TILE
from mint_core.lora.spec import AdapterSpec
from tests.interpreted_kernels import DEVICE, in_kernels, products_by_rows

from mint_core.lora import column_kernels  # isort: skip
from mint_core.lora.column_kernels import (  # isort: skip  # after interpreted_kernels
    PROGRAMS,
    add_own,
    output_tiles,
    splits_of,
)

# Widths that no tile divides, and an inner side of several splits.
GROUPS = (ModuleGroup(("q", "k", "v"), 600, (96, 70, 6)), ModuleGroup(("o",), 72, (130,)))
RANKS = (8, 3, 32, 64)
OWNERS = (0, 1, None, 3, 2, 0)
SIZE = 120


def make_bank(dtype: torch.dtype, *, row_wise: bool = False) -> tuple[ColumnBank, list[AdapterRow]]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    adapters = AdapterBank(GROUPS, DEVICE)
    modules = tuple(itertools.chain.from_iterable(group.modules for group in GROUPS))
    rows = [
        adapters.add(AdapterSpec(rank=r, alpha=7, use_rslora=False, seed=0, modules=modules))
        for r in RANKS
    ]
    for row in rows:
        row.part(Part.WEIGHTS).normal_(0.0, 0.1, generator=generator)
    with in_kernels():
        return ColumnBank(GROUPS, SIZE, DEVICE, dtype, row_wise=row_wise), rows


def make_pass(bank: ColumnBank, rows: list[AdapterRow], count: int) -> ActiveColumns:
    columns = bank.admit(rows)
    assert columns
    owners = itertools.islice(itertools.cycle(OWNERS), count)
    numbers = [bank.owner(None if owner is None else rows[owner]) for owner in owners]
    return bank.active(torch.tensor(numbers, device=DEVICE), columns)


def inputs(group: ModuleGroup, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(count)
    return (
        torch.randn(count, group.in_features, generator=generator, device=DEVICE).to(dtype),
        torch.randn(count, group.width, generator=generator, device=DEVICE).to(dtype),
    )


def by_kernels(active: ActiveColumns, x: Tensor, y: Tensor, group: ModuleGroup) -> Tensor:
    columns, result = active.groups[group.modules[0]], y.clone()
    tiles = output_tiles(group.out_features, DEVICE)
    described = active.column_owners, active.scales
    add_own(x, result, columns.a, columns.b, active.owners, described, tiles)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 6, 35])
@pytest.mark.parametrize("group", GROUPS)
def test_rows_get_what_the_oracle_gives_them(
    group: ModuleGroup, count: int, dtype: torch.dtype
) -> None:
    bank, rows = make_bank(dtype)
    active = make_pass(bank, rows, count)
    x, y = inputs(group, count, dtype)
    expected = y.clone()
    active.add_slowly(x, expected, group)

    ours = by_kernels(active, x, y, group)

    limit = 1e-5 if dtype == torch.float32 else 2**-6
    assert (ours - expected).abs().max() <= limit * expected.abs().max()
    assert torch.equal(ours[2::6], y[2::6])  # nobody's


@pytest.mark.parametrize("group", GROUPS)
def test_row_wise_a_rows_bits_depend_on_neither_rows_nor_places(
    group: ModuleGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column_kernels, "PROGRAMS", 20)  # so that few rows have more splits
    bank, (narrow, _, _, wide) = make_bank(torch.float32, row_wise=True)
    x, y = inputs(group, 35, torch.float32)
    owners = list(itertools.islice(itertools.cycle((wide, narrow, None)), 35))

    def computed(adapters: list[AdapterRow], part: slice) -> Tensor:
        columns = bank.admit(adapters)
        assert columns
        numbers = torch.tensor([bank.owner(owner) for owner in owners[part]], device=DEVICE)
        result = y[part].clone()
        bank.active(numbers, columns).add(x[part], result, group)
        return result

    with products_by_rows():
        # The wide one, of two tiles, lies behind the other; then before it, where it was alone.
        together = computed([narrow, wide], slice(0, 35))
        assert bank.owner(wide) == TILE
        bank = make_bank(torch.float32, row_wise=True)[0]
        assert torch.equal(computed([wide], slice(0, 1)), together[:1])
        assert bank.owner(wide) == 0
        assert torch.equal(computed([wide, narrow], slice(1, 20)), together[1:20])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_an_adapter_that_is_not_finite_reaches_its_own_rows_alone(broken: float) -> None:
    bank, rows = make_bank(torch.float32)
    group = GROUPS[0]
    x, y = inputs(group, 6, torch.float32)
    clean = by_kernels(make_pass(bank, rows, 6), x, y, group)
    bank, rows = make_bank(torch.float32)
    rows[1].part(Part.WEIGHTS)[-1] = broken

    ours = by_kernels(make_pass(bank, rows, 6), x, y, group)

    assert ours[1].isnan().all()
    others = [0, 2, 3, 4, 5]
    assert torch.equal(ours[others], clean[others])


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter
def test_what_others_columns_make_of_a_row_is_cut_out_even_if_infinite() -> None:
    bank, rows = make_bank(torch.float32)
    rows[1].part(Part.WEIGHTS).fill_(3e38)
    group = GROUPS[0]
    x, y = inputs(group, 6, torch.float32)

    ours = by_kernels(make_pass(bank, rows, 6), x, y, group)

    assert not ours[1].isfinite().any()
    assert ours[[0, 2, 3, 4, 5]].isfinite().all()


def test_splits_fill_a_gpu_and_no_more() -> None:
    assert splits_of(72, 1) == 1
    assert splits_of(1024, 1) == 4
    assert splits_of(12_288, 4) == 16
    assert splits_of(12_288, 100) == 2
    assert splits_of(12_288, PROGRAMS + 1) == 1

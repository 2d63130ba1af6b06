"""Adapters in columns, whoever came and went before, against each row by itself."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mint_core.lora.bank import AdapterBank, AdapterRow, Part
from mint_core.lora.columns import LEAST_COLUMNS, ColumnBank
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.spec import AdapterSpec

TOGETHER = ModuleGroup(("a", "b", "c"), 12, (20, 6, 10))
ALONE = ModuleGroup(("d",), 20, (8,))
GROUPS = (TOGETHER, ALONE)
TRAINED = (("a", "b", "c", "d"), ("a", "c"), ("d",))
RANKS = (8, 3, 32, 64, 16, 40, 8, 100)
SIZE = 200
CPU = torch.device("cpu")


def make_rows() -> list[AdapterRow]:
    """Adapters of several ranks, which train all of the modules or some."""
    generator = torch.Generator().manual_seed(1)
    bank = AdapterBank(GROUPS, CPU)
    rows = []
    for i, rank in enumerate(RANKS):
        modules = TRAINED[i % len(TRAINED)]
        row = bank.add(AdapterSpec(rank=rank, alpha=i, use_rslora=False, seed=0, modules=modules))
        for module in modules:
            a, b = row.bank.matrices(row.part(Part.WEIGHTS), module)
            for matrix in (a[: row.spec.rank], b[:, : row.spec.rank]):
                matrix.copy_(torch.randn(matrix.shape, generator=generator))
        rows.append(row)
    return rows


def make_columns() -> ColumnBank:
    return ColumnBank(GROUPS, SIZE, CPU, torch.float32)


def one_by_one(x: Tensor, owners: Sequence[AdapterRow | None], group: ModuleGroup) -> Tensor:
    y = torch.zeros(len(x), group.width)
    for i, row in enumerate(owners):
        for module, columns in zip(group.modules, group.columns, strict=True):
            if row is not None:
                a, b = row.bank.matrices(row.part(Part.WEIGHTS), module)
                y[i, columns] = row.spec.scale * (b @ (a @ x[i]))
    return y


def apply(
    bank: ColumnBank,
    x: Tensor,
    owners: Sequence[AdapterRow | None],
    columns: int,
    group: ModuleGroup,
) -> Tensor:
    y = torch.zeros(len(x), group.width)
    numbers = torch.tensor([bank.owner(row) for row in owners])
    bank.active(numbers, columns).add(x, y, group)
    return y


def check(bank: ColumnBank, rows: Sequence[AdapterRow], seed: int = 0) -> int | None:
    """Admits adapters, compares what rows of theirs and of nobody get, and returns the columns."""
    columns = bank.admit(rows)
    if columns:
        owners = [*rows, None, *rows[::-1]]
        generator = torch.Generator().manual_seed(seed)
        for group in GROUPS:
            x = torch.randn(len(owners), group.in_features, generator=generator)
            ours = apply(bank, x, owners, columns, group)
            torch.testing.assert_close(ours, one_by_one(x, owners, group), rtol=1e-4, atol=1e-4)
    return columns


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from(range(len(RANKS))), unique=True), max_size=12))
def test_rows_get_their_own_adapters_whoever_came_before(batches: list[list[int]]) -> None:
    rows, bank = make_rows(), make_columns()
    for seed, batch in enumerate(batches):
        chosen = [rows[i] for i in batch]
        columns = check(bank, chosen, seed)
        needed = sum(row.bank.stored_rank for row in chosen)
        assert (columns is None) == (needed > SIZE)
        assert columns is None or columns >= needed


def test_few_columns_are_enough_for_few_adapters() -> None:
    rows, bank = make_rows(), make_columns()
    assert check(bank, []) == 0
    assert check(bank, rows[:2]) == LEAST_COLUMNS
    assert check(bank, rows[2:4]) == 2 * LEAST_COLUMNS
    assert check(bank, rows[:4]) == 2 * LEAST_COLUMNS
    assert check(bank, rows[:5]) == 2 * LEAST_COLUMNS
    assert check(bank, rows[:6]) == SIZE
    # Those who come later take the columns of those who are not wanted.
    assert check(bank, rows[6:7]) == LEAST_COLUMNS


def test_an_adapter_that_stays_hot_is_not_copied_again() -> None:
    rows, bank = make_rows(), make_columns()
    bank.admit(rows[:2])
    place = bank.owner(rows[1])
    bank._columns["a"].a[:, place] = 7.0  # which a copy would overwrite
    bank.admit([rows[4], rows[1]])
    bank.admit([])
    bank.admit([rows[1], rows[2]])
    assert bank.owner(rows[1]) == place
    assert (bank._columns["a"].a[:, place] == 7.0).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("group", GROUPS)
def test_an_adapter_that_is_not_finite_reaches_its_own_rows_alone(
    broken: float, group: ModuleGroup
) -> None:
    rows, bank = make_rows(), make_columns()
    rows[1].part(Part.WEIGHTS)[-1] = broken  # the last of a B
    columns = bank.admit(rows[:3])
    assert columns
    owners = [rows[0], rows[1], None, rows[2]]
    x = torch.ones(4, group.in_features)
    ours = apply(bank, x, owners, columns, group)
    assert ours[1].isnan().all()
    torch.testing.assert_close(ours[[0, 2, 3]], one_by_one(x, owners, group)[[0, 2, 3]])


def test_what_others_columns_make_of_a_row_is_cut_out_even_if_infinite() -> None:
    rows, bank = make_rows(), make_columns()
    rows[1].part(Part.WEIGHTS).fill_(3e38)
    columns = bank.admit(rows[:3])
    assert columns
    owners = [rows[0], None, rows[2]]
    x = torch.full((3, TOGETHER.in_features), 2.0)
    ours = apply(bank, x, owners, columns, TOGETHER)
    torch.testing.assert_close(ours, one_by_one(x, owners, TOGETHER))

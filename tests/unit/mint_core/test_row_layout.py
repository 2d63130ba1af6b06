"""Rows read and made without the bank, against the bank."""

import pickle

import numpy as np
import pytest
import torch

from mint_core.errors import InvalidRequest
from mint_core.lora.bank import AdapterBank, Part
from mint_core.lora.groups import ModuleGroup
from mint_core.lora.row_layout import Matrix, RowLayout
from mint_core.lora.spec import lora_a_name
from tests.unit.mint_core.test_bank import make_arrays, make_bank, make_spec


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
@pytest.mark.parametrize("modules", [(), ("lm_head",)])
def test_a_row_is_made_and_read_as_the_bank_does(rank: int, modules: tuple[str, ...]) -> None:
    spec = make_spec(rank, *modules)
    arrays = make_arrays(spec, seed=rank)
    row = make_bank().add(spec)
    row.load(Part.WEIGHTS, arrays)
    layout = pickle.loads(pickle.dumps(row.bank.layout))

    made = layout.row(spec, arrays)

    assert layout.size == row.bank.row_size
    assert made.tobytes() == row.part(Part.WEIGHTS).numpy().tobytes()
    read = layout.matrices(made, spec)
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)


def test_layouts_are_equal_where_rows_lie_alike() -> None:
    bank, same = make_bank(), make_bank()
    assert bank.rank_class(3).layout == same.rank_class(8).layout
    assert bank.rank_class(8).layout != bank.rank_class(16).layout

    def banked(*groups: ModuleGroup) -> RowLayout:
        return AdapterBank(groups, torch.device("cpu")).rank_class(8).layout

    q, k = ModuleGroup(("q",), 6, (10,)), ModuleGroup(("k",), 6, (10,))
    both = ModuleGroup(("q", "k"), 6, (10, 10))
    layouts = {banked(q, k).encoded, banked(k, q).encoded, banked(both).encoded}
    assert len(layouts) == 3


def test_an_adapter_of_another_model_is_refused() -> None:
    layout = make_bank().rank_class(4).layout
    spec = make_spec(4)
    arrays = make_arrays(spec, seed=0)
    with pytest.raises(InvalidRequest, match="no linear layer `other`"):
        layout.row(make_spec(4, "other"), {})
    arrays[lora_a_name("lm_head")] = arrays[lora_a_name("lm_head")][:, :5]
    with pytest.raises(InvalidRequest, match=r"lm_head.lora_A.* has shape \[4, 5\] but .*\[4, 6\]"):
        layout.row(spec, arrays)


def test_a_matrix_that_exceeds_the_row_is_not_read() -> None:
    row = np.zeros(12, np.float32)
    assert Matrix(2, 2, 5, 5, 1).of(row).shape == (2, 5)
    with pytest.raises(ValueError, match=r"incompatible|too small"):
        Matrix(3, 2, 5, 5, 1).of(row)

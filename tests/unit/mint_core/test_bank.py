"""Rows of the adapter bank: padding, memory, what may be loaded."""

import numpy as np
import pytest
import torch

from mint_core.errors import InvalidRequest
from mint_core.lora.bank import AdapterBank, Part
from mint_core.lora.groups import LinearShape, complete
from mint_core.lora.spec import AdapterSpec, lora_a_name, lora_b_name

SHAPES = {"a.q_proj": LinearShape(6, 10), "lm_head": LinearShape(6, 20)}


def make_spec(rank: int, *modules: str) -> AdapterSpec:
    chosen = modules or tuple(sorted(SHAPES))
    return AdapterSpec(rank=rank, alpha=32.0, use_rslora=False, seed=0, modules=chosen)


def make_bank() -> AdapterBank:
    return AdapterBank(complete(SHAPES), torch.device("cpu"))


def make_arrays(spec: AdapterSpec, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for module in spec.modules:
        shape = SHAPES[module]
        arrays[lora_a_name(module)] = rng.normal(size=(spec.rank, shape.in_features))
        arrays[lora_b_name(module)] = rng.normal(size=(shape.out_features, spec.rank))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def test_what_was_loaded_is_exported_whatever_the_rank() -> None:
    bank = make_bank()
    specs = [make_spec(rank) for rank in (1, 8, 3, 8, 5, 8, 128)]
    arrays = [make_arrays(spec, seed) for seed, spec in enumerate(specs)]
    rows = []
    for spec, array in zip(specs, arrays, strict=True):
        row = bank.add(spec)
        row.load(Part.WEIGHTS, array)
        rows.append(row)
    for row, array in zip(rows, arrays, strict=True):
        exported = row.export(Part.WEIGHTS)
        assert exported.keys() == array.keys()
        assert all(np.array_equal(exported[name], array[name]) for name in array)


def test_a_part_takes_memory_from_its_first_use_until_it_is_freed() -> None:
    row = make_bank().add(make_spec(8))
    assert not row.held
    for part in Part:
        assert not row.part(part).any()
        row.bank.matrices(row.part(part), "lm_head")[0].fill_(3.0)
    assert set(row.held) == set(Part)
    row.free(Part.EXP_AVG)
    assert Part.EXP_AVG not in row.held
    assert not row.bank.matrices(row.part(Part.EXP_AVG), "lm_head")[0].any()
    assert row.bank.matrices(row.part(Part.WEIGHTS), "lm_head")[0].all()


def test_a_part_that_takes_no_memory_is_exported_as_zeros() -> None:
    row = make_bank().add(make_spec(3))
    exported = row.export(Part.EXP_AVG)
    assert {name: array.shape for name, array in exported.items()} == {
        name: array.shape for name, array in make_arrays(row.spec, 0).items()
    }
    assert not any(array.any() for array in exported.values())
    assert not row.held


def test_a_row_that_comes_back_is_what_left() -> None:
    bank = make_bank()
    row = bank.add(make_spec(5))
    arrays = make_arrays(row.spec, 1)
    row.load(Part.WEIGHTS, arrays)
    kept = {part: vector.clone() for part, vector in row.held.items()}
    row.leave()
    with pytest.raises(AssertionError, match="away"):
        row.bank.matrices(row.part(Part.WEIGHTS), "lm_head")
    row.come_back(kept)
    exported = row.export(Part.WEIGHTS)
    assert all(np.array_equal(exported[name], arrays[name]) for name in arrays)


def test_only_the_adapters_own_modules_are_counted_and_exported() -> None:
    row = make_bank().add(make_spec(2, "lm_head"))
    assert row.parameter_count() == 2 * (6 + 20)
    assert set(row.export(Part.WEIGHTS)) == {lora_a_name("lm_head"), lora_b_name("lm_head")}


def test_a_refused_load_leaves_the_row_as_it_was() -> None:
    row = make_bank().add(make_spec(2))
    good = make_arrays(row.spec, 1)
    row.load(Part.WEIGHTS, good)
    bad = {**make_arrays(row.spec, 2), lora_a_name("lm_head"): np.zeros((3, 6), np.float32)}
    with pytest.raises(InvalidRequest, match=r"shape \[3, 6\] but its layer needs \[2, 6\]"):
        row.load(Part.WEIGHTS, bad)
    assert all(np.array_equal(row.export(Part.WEIGHTS)[name], good[name]) for name in good)


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"no linear layer `b\.q_proj`"):
        make_bank().add(make_spec(2, "b.q_proj"))

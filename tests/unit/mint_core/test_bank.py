"""Rows of the adapter bank: padding, growth, what may be loaded."""

import numpy as np
import pytest
import torch

from mint_core.errors import InvalidRequest
from mint_core.lora.bank import TRAINING_PARTS, AdapterBank, LinearShape, Part
from mint_core.lora.spec import AdapterSpec, lora_a_name, lora_b_name

SHAPES = {"a.q_proj": LinearShape(6, 10), "lm_head": LinearShape(6, 20)}


def make_spec(rank: int, *modules: str) -> AdapterSpec:
    chosen = modules or tuple(sorted(SHAPES))
    return AdapterSpec(rank=rank, alpha=32.0, use_rslora=False, seed=0, modules=chosen)


def make_bank() -> AdapterBank:
    return AdapterBank(SHAPES, TRAINING_PARTS, torch.device("cpu"))


def make_arrays(spec: AdapterSpec, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for module in spec.modules:
        shape = SHAPES[module]
        arrays[lora_a_name(module)] = rng.normal(size=(spec.rank, shape.in_features))
        arrays[lora_b_name(module)] = rng.normal(size=(shape.out_features, spec.rank))
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def test_what_was_loaded_is_exported_though_the_bank_grew_meanwhile() -> None:
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


def test_a_slot_taken_again_is_zero_in_every_part() -> None:
    bank = make_bank()
    row = bank.add(make_spec(8))
    for part in TRAINING_PARTS:
        row.part(part).fill_(3.0)
    bank.remove(row)
    again = bank.add(make_spec(8))
    assert again.slot == row.slot
    assert all(not again.part(part).any() for part in TRAINING_PARTS)


def test_only_the_adapters_own_modules_are_counted_and_exported() -> None:
    row = make_bank().add(make_spec(2, "lm_head"))
    assert row.parameter_count() == 2 * (6 + 20)
    assert set(row.export(Part.WEIGHTS)) == {lora_a_name("lm_head"), lora_b_name("lm_head")}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda arrays: arrays.pop(lora_a_name("lm_head")), "missing or unexpected"),
        (lambda arrays: arrays.update(extra=np.zeros(1)), "missing or unexpected"),
        (
            lambda arrays: arrays.update({lora_a_name("lm_head"): np.zeros((3, 6))}),
            r"shape \[3, 6\] but its layer needs \[2, 6\]",
        ),
        (lambda arrays: arrays[lora_b_name("lm_head")].fill(np.nan), "NaN or Inf"),
    ],
)
def test_a_refused_load_leaves_the_row_as_it_was(spoil: object, message: str) -> None:
    row = make_bank().add(make_spec(2))
    good = make_arrays(row.spec, 1)
    row.load(Part.WEIGHTS, good)
    bad = make_arrays(row.spec, 2)
    assert callable(spoil)
    spoil(bad)
    with pytest.raises(InvalidRequest, match=message):
        row.load(Part.WEIGHTS, bad)
    assert all(np.array_equal(row.export(Part.WEIGHTS)[name], good[name]) for name in good)


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"no linear layer `b\.q_proj`"):
        make_bank().add(make_spec(2, "b.q_proj"))

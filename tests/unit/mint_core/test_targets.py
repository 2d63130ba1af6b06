"""Which modules an adapter trains, and its first weights."""

import numpy as np
import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from mint_core.errors import InvalidRequest
from mint_core.lora.groups import LinearShape
from mint_core.lora.spec import AdapterSpec, LoraRequest, lora_a_name, lora_b_name
from mint_core.lora.targets import initial_arrays, resolve

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (LoraRequest(rank=1), MODULES),
        (LoraRequest(rank=1, train_attn=False), [MODULES[2], MODULES[4]]),
        (LoraRequest(rank=1, train_mlp=False), [MODULES[i] for i in (0, 1, 3, 4)]),
        (LoraRequest(rank=1, train_unembed=False), MODULES[:4]),
        (LoraRequest(rank=1, target_modules=("q_proj",)), [MODULES[0], MODULES[3]]),
        (LoraRequest(rank=1, target_modules=(MODULES[0],)), [MODULES[0]]),
        (LoraRequest(rank=1, target_modules=("lm_head", "up_proj")), [MODULES[2], MODULES[4]]),
    ],
)
def test_switches_and_names_choose_modules(request_: LoraRequest, expected: list[str]) -> None:
    assert resolve(request_, MODULES).modules == tuple(sorted(expected))


@pytest.mark.parametrize("name", ["q_proj", "proj", "mlp.up_proj", "0.mlp.up_proj", MODULES[4]])
def test_names_match_as_in_peft(name: str) -> None:
    config = LoraConfig(target_modules=[name])
    expected = [key for key in MODULES if check_target_module_exists(config, key)]
    if expected:
        chosen = resolve(LoraRequest(rank=1, target_modules=(name,)), MODULES).modules
        assert chosen == tuple(sorted(expected))
    else:
        with pytest.raises(InvalidRequest):
            resolve(LoraRequest(rank=1, target_modules=(name,)), MODULES)


def test_a_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'gate_proj', which no linear layer") as caught:
        resolve(LoraRequest(rank=1, target_modules=("q_proj", "gate_proj")), MODULES)
    assert caught.value.field == "lora_config.target_modules"


def test_switches_that_leave_nothing_to_train_are_refused() -> None:
    off = LoraRequest(rank=1, train_attn=False, train_mlp=False, train_unembed=False)
    mlp = LoraRequest(rank=1, train_attn=False, train_unembed=False)  # whose layers are experts
    for request, modules in ((off, MODULES), (mlp, MODULES[:1])):
        with pytest.raises(InvalidRequest, match="leave no linear layer to train; set one"):
            resolve(request, modules)


def test_a_missing_seed_is_drawn_and_a_given_one_kept() -> None:
    drawn = {resolve(LoraRequest(rank=1), MODULES).seed for _ in range(3)}
    assert len(drawn) == 3
    assert resolve(LoraRequest(rank=1, seed=0), MODULES).seed == 0


def test_first_weights_are_keyed_by_seed_and_module() -> None:
    shapes = {name: LinearShape(64, 32) for name in MODULES}

    def draw(seed: int, *modules: str) -> dict[str, np.ndarray]:
        spec = AdapterSpec(rank=4, alpha=32, use_rslora=False, seed=seed, modules=modules)
        return initial_arrays(spec, shapes)

    all_modules, one = draw(7, *MODULES), draw(7, MODULES[2])
    a, b = lora_a_name(MODULES[2]), lora_b_name(MODULES[2])
    assert np.array_equal(all_modules[a], one[a])  # whatever else is trained
    assert not np.array_equal(all_modules[a], all_modules[lora_a_name(MODULES[0])])
    assert not np.array_equal(draw(8, MODULES[2])[a], one[a])
    assert not one[b].any()
    bound = 64**-0.5
    assert np.abs(one[a]).max() <= bound
    assert np.abs(one[a]).max() > 0.9 * bound
    assert abs(one[a].mean()) < 0.2 * bound

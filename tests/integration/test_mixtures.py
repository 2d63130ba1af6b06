"""Tiny mixtures of experts behind both services, one whose layers all attend, one with states: on
policy with and without the choices of their routers, and what they refuse.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import mint
from mint import types
from tests.families import named
from tests.families.mixtures import EXPERTS, PER_TOKEN
from tests.integration.test_rl_loop import MOST_KL, kl, rewarded
from tests.models import VOCABULARY_SIZE
from tests.peft_folders import logprobs_of, peft_logprobs, save_adapter
from tests.services import Services, running_services

PROMPTS, SAMPLES, NEW_TOKENS = 8, 8, 6
# How many of their layers have experts, and what their other MLPs are called.
MODELS = {"Qwen 3 MoE": (2, "mlp"), "Qwen 3.5 MoE of text": (3, "shared_expert")}


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def mixture(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    model = named(family).make(tmp_path_factory.mktemp("mixture"))
    with running_services(model, tmp_path_factory.mktemp("store"), name="tiny-mixture") as both:
        yield both


@pytest.fixture
def client(mixture: Services) -> Iterator[mint.ServiceClient]:
    with mint.ServiceClient(base_url=mixture.trainer) as client:
        yield client


def train(client: mint.ServiceClient, steps: int, *, replayed: bool) -> list[float]:
    """The KL of each step between sampler and trainer."""
    prompts = np.random.default_rng(0).integers(3, VOCABULARY_SIZE, (PROMPTS, 8)).tolist()
    params = types.SamplingParams(max_tokens=NEW_TOKENS, stop=[])
    training = client.create_lora_training_client(rank=8, seed=1, train_experts=False)
    kls = []
    for _ in range(steps):
        sampler = training.save_weights_and_get_sampling_client()
        futures = [
            sampler.sample(
                types.ModelInput.from_ints(p), SAMPLES, params, include_routed_experts=replayed
            )
            for p in prompts
        ]
        data: list[types.Datum] = []
        for prompt, future in zip(prompts, futures, strict=True):
            answer = future.result(120)
            more, _ = rewarded(prompt, answer)
            for datum, sequence in zip(more, answer.sequences, strict=True):
                told = answer.prompt_routed_experts + sequence.routed_experts
                inputs = datum.model_input, datum.loss_fn_inputs
                data.append(types.Datum(*inputs, routed_experts=told))
        assert bool(data[0].routed_experts) == replayed
        computed = training.forward_backward(data, loss_fn="importance_sampling")
        training.optim_step(types.AdamParams(learning_rate=3e-3)).result(120)
        kls.append(kl(data, computed.result(120)))
    return kls


@pytest.mark.parametrize("replayed", [False, True])
def test_sampler_and_trainer_stay_on_one_policy(client: mint.ServiceClient, replayed: bool) -> None:
    assert max(train(client, 3, replayed=replayed)) <= MOST_KL


@pytest.mark.slow
@pytest.mark.parametrize("replayed", [False, True])
def test_they_stay_on_it_for_fifty_steps(client: mint.ServiceClient, replayed: bool) -> None:
    assert max(train(client, 50, replayed=replayed)) <= MOST_KL


def test_both_say_what_they_can(client: mint.ServiceClient, family: str) -> None:
    layers, _ = MODELS[family]
    capabilities = client.get_server_capabilities()
    assert "routed_experts" in capabilities.features
    (model,) = capabilities.supported_models
    assert model.expert_layers == layers
    assert (model.experts, model.experts_per_token) == (EXPERTS, PER_TOKEN)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, r"`lora_config\.train_mlp` would train the experts of tiny-mixture"),
        ({"train_attn": False}, r"`lora_config\.train_mlp` would train the experts of"),
        ({"train_experts": True}, r"`lora_config\.train_experts` would train the experts of"),
    ],
)
def test_experts_are_not_trained_without_a_word(
    client: mint.ServiceClient, asked: dict[str, bool], words: str
) -> None:
    with pytest.raises(mint.APIError, match=f"{words}.*; set `train_experts` to false to leave"):
        client.create_lora_training_client(rank=4, **asked)


def test_experts_are_left_out_in_so_many_words(client: mint.ServiceClient, family: str) -> None:
    _, others = MODELS[family]
    training = client.create_lora_training_client(rank=4, train_experts=False)
    modules = training.get_info().training_run.trained_modules
    assert {name.split(".")[-2] for name in modules if "mlp" in name} == {others}
    assert not [name for name in modules if "experts" in name or name.endswith("gate")]
    plain = client.create_lora_training_client(rank=4, train_mlp=False)
    trained = plain.get_info().training_run.trained_modules
    assert set(trained) == {name for name in modules if "mlp" not in name}


def test_choices_of_another_length_are_refused_by_name(client: mint.ServiceClient) -> None:
    training = client.create_lora_training_client(rank=4, train_experts=False)
    tokens = types.ModelInput.from_ints([5, 6, 7])
    choices = [[[0, 1]] * 2] * 2
    datum = types.Datum(tokens, {"target_tokens": [6, 7, 8]}, routed_experts=choices)
    with pytest.raises(mint.BadRequestError, match=r"`data\[0\]\.routed_experts` has 16 bytes"):
        training.forward([datum], loss_fn="cross_entropy").result(60)


def test_a_merged_model_computes_what_peft_does(
    client: mint.ServiceClient, mixture: Services, tmp_path: Path
) -> None:
    rest = client.create_rest_client()
    modules = ["q_proj", "lm_head"]
    save_adapter(mixture.model, tmp_path / "theirs", r=4, target_modules=modules)
    uploaded = rest.upload_checkpoint(tmp_path / "theirs", "a", base_model="tiny-mixture")
    export = rest.export_checkpoint(uploaded.result(120).path).result(120)
    folder = rest.download_checkpoint(export.path, tmp_path / "merged").result(120)
    merged = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = peft_logprobs(mixture.model, tmp_path / "theirs")
    assert logprobs_of(merged) == pytest.approx(expected, rel=1e-5, abs=1e-5)

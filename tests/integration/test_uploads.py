"""Adapters that PEFT made: uploaded, sampled from, trained on, and refused where they must be."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mint
from mint import types
from tests.peft_folders import PROMPT, change_config, change_tensors, peft_logprobs, save_adapter
from tests.services import SERVED_NAME, Services

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ATTENTION + MLP},
    "alpha_of_8": {"r": 16, "lora_alpha": 8, "target_modules": "all-linear"},
    "a_subset": {"r": 3, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"]},
    "only_attention": {"r": 8, "target_modules": ATTENTION},
    "by_a_pattern": {"r": 2, "target_modules": r".*\.self_attn\.[qv]_proj"},
    "one_layer": {"r": 4, "target_modules": MLP, "layers_to_transform": [1]},
    "the_head": {"r": 4, "target_modules": ["lm_head"]},
    "head_and_mlp": {"r": 8, "lora_alpha": 24, "target_modules": [*MLP, "lm_head"]},
    "with_dropout": {"r": 8, "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    "in_bfloat16": {"r": 8, "dtype": torch.bfloat16},
    "in_float16": {"r": 8, "dtype": torch.float16},
    "in_float64": {"r": 8, "dtype": torch.float64},
}


def upload(service: mint.ServiceClient, folder: Path, **options: Any) -> types.Checkpoint:
    rest = service.create_rest_client()
    return rest.upload_checkpoint(folder, "theirs", base_model=SERVED_NAME, **options).result(60)


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_computes_what_peft_does(
    kind: str, services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    folder = save_adapter(services.model, tmp_path / "theirs", **KINDS[kind])
    expected = peft_logprobs(services.model, folder)

    checkpoint = upload(service, folder)

    sampler = service.create_sampling_client(checkpoint.path)
    sampled = sampler.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result(60)
    assert sampled[1:] == pytest.approx(expected, abs=2e-5)
    training = service.create_training_client_from_state(checkpoint.path)
    assert logprobs(training) == pytest.approx(expected, abs=2e-5)
    config = training.training_run.lora_config
    assert config.rank == KINDS[kind]["r"]
    assert config.alpha == KINDS[kind].get("lora_alpha", 8)
    assert config.use_rslora == KINDS[kind].get("use_rslora", False)
    assert config.target_modules == checkpoint.lora_config.target_modules


@pytest.mark.parametrize("adapter", ["default", "my-adapter"])
def test_keys_may_hold_the_adapters_name(
    adapter: str, services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    folder = save_adapter(services.model, tmp_path / "theirs", **KINDS["rslora"])
    expected = peft_logprobs(services.model, folder)

    def name_it(found: dict[str, torch.Tensor]) -> None:
        for key in list(found):
            found[key.replace(".weight", f".{adapter}.weight")] = found.pop(key)

    change_tensors(folder, name_it)
    training = service.create_training_client_from_state(upload(service, folder).path)
    assert logprobs(training) == pytest.approx(expected, abs=2e-5)


def test_the_run_of_an_upload_trains_only_once_it_is_loaded(
    services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    folder = save_adapter(services.model, tmp_path / "theirs", **KINDS["rslora"])
    checkpoint = upload(service, folder, user_metadata={"from": "elsewhere"})

    run = service.get_training_run(checkpoint.training_run_id)
    assert (run.kind, run.step, run.lora_rank) == ("uploaded", 0, 4)
    assert run.metadata == checkpoint.metadata == {"from": "elsewhere"}
    for act in (
        lambda: service.open_training_run(run.training_run_id),
        lambda: service.update_training_run(run.training_run_id, {}),
        lambda: next(service.watch_training_run(run.training_run_id)),
    ):
        with pytest.raises(mint.BadRequestError, match="takes no calls") as caught:
            act()
        assert caught.value.reason == "TRAINING_RUN_UPLOADED"

    training = service.create_training_client_from_state(checkpoint.path)
    assert training.training_run.kind == "trained"
    before = logprobs(training)
    train(training)
    assert logprobs(training) != before
    training.load_state(checkpoint.path).result(60)
    assert logprobs(training) == before


def test_an_upload_loads_into_a_run_of_its_shape(
    services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    folder = save_adapter(services.model, tmp_path / "theirs", r=8, lora_alpha=32)
    checkpoint = upload(service, folder)
    same = service.create_lora_training_client(rank=8, target_modules=["q_proj"])
    other = service.create_lora_training_client(rank=8, alpha=16, target_modules=["q_proj"])

    same.load_state(checkpoint.path).result(60)
    with pytest.raises(mint.BadRequestError, match="another scale of alpha and rank"):
        other.load_state(checkpoint.path).result(60)

    assert logprobs(same) == pytest.approx(peft_logprobs(services.model, folder), abs=2e-5)


def test_an_adapter_alone_has_no_optimizer_to_continue_with(
    services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    checkpoint = upload(service, save_adapter(services.model, tmp_path / "theirs"))

    with pytest.raises(mint.BadRequestError, match="has no optimizer state"):
        service.create_training_client_from_state_with_optimizer(checkpoint.path)


def test_downloaded_training_state_continues_bitwise_where_it_is_uploaded(
    service: mint.ServiceClient, tmp_path: Path
) -> None:
    rest = service.create_rest_client()
    training = service.create_lora_training_client(rank=4, seed=1)
    train(training)
    saved = training.save_state("half").result(60)
    folder = rest.download_checkpoint(saved.path, tmp_path / "state").result(60)

    checkpoint = rest.upload_checkpoint(folder, "half", with_optimizer=True).result(60)
    continued = service.create_training_client_from_state_with_optimizer(checkpoint.path)

    assert checkpoint.checkpoint_type == "training"
    assert checkpoint.step == continued.training_run.step == 2
    train(training)
    train(continued)
    assert logprobs(continued) == logprobs(training)


def test_copies_of_the_base_that_were_rounded_are_taken(
    services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    folder = save_adapter(
        services.model, tmp_path / "theirs", target_modules=["lm_head"], dtype=torch.float16
    )
    checkpoint = upload(service, folder)

    sampler = service.create_sampling_client(checkpoint.path)
    found = sampler.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result(60)
    assert found[1:] == pytest.approx(peft_logprobs(services.model, folder), abs=5e-3)


def test_an_upload_is_named_by_its_base_models_last_word(
    services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    folder = save_adapter(services.model, tmp_path / "theirs")
    rest = service.create_rest_client()
    change_config(folder, base_model_name_or_path="/models/of/theirs/Qwen3-0.6B/")
    assert rest.upload_checkpoint(folder, "a").result(60).base_model == SERVED_NAME

    change_config(folder, base_model_name_or_path="meta/Llama")
    with pytest.raises(mint.BadRequestError, match="say so with `base_model`"):
        rest.upload_checkpoint(folder, "a").result(60)
    with pytest.raises(mint.NotFoundError, match="is not served here"):
        rest.upload_checkpoint(folder, "a", base_model="meta/Llama").result(60)


def test_deleting_an_uploads_checkpoint_ends_its_run(
    services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    rest = service.create_rest_client()
    checkpoint = upload(service, save_adapter(services.model, tmp_path / "theirs"))
    run = checkpoint.training_run_id
    copy = rest.copy_checkpoint(checkpoint.path, "copy").result(60)

    rest.delete_checkpoint(run, checkpoint.checkpoint_id).result(60)
    assert rest.get_training_run(run).result(60).kind == "uploaded"
    with pytest.raises(mint.BadRequestError, match="set `delete_checkpoints`"):
        service.delete_training_run(run)
    service.delete_training_run(run, delete_checkpoints=True)

    for path in (checkpoint.path, copy.path):
        with pytest.raises(mint.NotFoundError):
            rest.get_checkpoint(path).result(60)
    with pytest.raises(mint.NotFoundError):
        rest.get_training_run(run).result(60)


def train(training: mint.TrainingClient) -> None:
    for step in range(2):
        training.forward_backward([datum((5 + step, 9, 11, 300, 41))])
        training.optim_step(types.AdamParams(learning_rate=0.01)).result(60)


def datum(tokens: tuple[int, ...] = PROMPT) -> types.Datum:
    model_input = types.ModelInput.from_ints(tokens[:-1])
    return types.Datum(model_input, {"target_tokens": list(tokens[1:])})


def logprobs(training: mint.TrainingClient) -> list[float]:
    """Of the prompt's tokens but the first."""
    output = training.forward([datum()]).result(60)
    found: list[float] = output.loss_fn_outputs[0]["logprobs"].tolist()
    return found

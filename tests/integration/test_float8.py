"""Services on float8 weights, and those on the same model without, on one store."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import mint
from mint import types
from tests.servers import running_sampler, running_trainer

LIMIT_S = 60.0
PROMPT = [5, 6, 7, 8, 9]
TARGETS = [6, 7, 8, 9, 10]


@dataclass(frozen=True, slots=True)
class Trained:
    """On float8 weights."""

    store: Path
    state: str
    adapter: str
    logprobs: list[float]  # of the trainer
    sampled: list[float]  # of the sampler


def example() -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(PROMPT),
        loss_fn_inputs={"target_tokens": TARGETS, "weights": [1.0] * len(TARGETS)},
    )


def logprobs_of(training: mint.TrainingClient) -> list[float]:
    output = training.forward([example()], "cross_entropy").result(LIMIT_S)
    return [float(value) for value in output.loss_fn_outputs[0]["logprobs"].tolist()]


def scored(sampling: mint.SamplingClient) -> list[float]:
    whole = types.ModelInput.from_ints([*PROMPT, TARGETS[-1]])
    return [float(value) for value in sampling.compute_logprobs(whole).result(LIMIT_S)[1:]]


@pytest.fixture(scope="module")
def trained(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    store = tmp_path_factory.mktemp("store")
    options = {"base_model_name": "tiny", "dtype": "float8"}
    with (
        running_sampler(qwen3_folder, store, **options) as sampler,
        running_trainer(qwen3_folder, store, sampler_address=sampler.address, **options) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        assert "float8 weights are emulated on a CPU" in trainer.log_text()
        training = service.create_lora_training_client(rank=8)
        for _ in range(3):
            training.forward_backward([example()], "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=1e-2))
        state = training.save_state("s").result(LIMIT_S).path
        adapter = training.save_weights_for_sampler("a").result(LIMIT_S).path
        sampling = service.create_sampling_client(model_path=adapter)
        wish = types.SamplingParams(max_tokens=4, seed=1)
        prompt = types.ModelInput.from_ints(PROMPT)
        assert sampling.sample(prompt, 1, wish).result(LIMIT_S).sequences[0].tokens
        yield Trained(store, state, adapter, logprobs_of(training), scored(sampling))


def test_trainer_and_sampler_agree(trained: Trained) -> None:
    assert trained.sampled == pytest.approx(trained.logprobs, abs=1e-5)


def test_without_float8_weights_neither_adapter_nor_state_opens_unless_told_to(
    trained: Trained, qwen3_folder: Path, tmp_path: Path
) -> None:
    with (
        running_sampler(qwen3_folder, trained.store, base_model_name="tiny") as sampler,
        running_trainer(
            qwen3_folder,
            trained.store,
            state=tmp_path / "state",
            base_model_name="tiny",
            sampler_address=sampler.address,
        ) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        told = "that is this model with float8 weights; .* --adapters-across-dtypes"
        with pytest.raises(mint.MintError, match=told):
            service.create_training_client_from_state(trained.state)
        training = service.create_lora_training_client(rank=8)
        with pytest.raises(mint.MintError, match=told):
            training.load_state(trained.state).result(LIMIT_S)
        with pytest.raises(mint.MintError, match=told):
            scored(service.create_sampling_client(model_path=trained.adapter))


def test_told_to_they_open_and_compute_nearly_the_same(
    trained: Trained, qwen3_folder: Path, tmp_path: Path
) -> None:
    options = {"base_model_name": "tiny", "adapters_across_dtypes": True}
    with (
        running_sampler(qwen3_folder, trained.store, **options) as sampler,
        running_trainer(
            qwen3_folder,
            trained.store,
            state=tmp_path / "state",
            sampler_address=sampler.address,
            **options,
        ) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        training = service.create_training_client_from_state(trained.state)
        loaded = service.create_lora_training_client(rank=8)
        loaded.load_state(trained.state).result(LIMIT_S)
        sampling = service.create_sampling_client(model_path=trained.adapter)
        ours = logprobs_of(training)
        assert ours == logprobs_of(loaded)
        assert scored(sampling) == pytest.approx(ours, abs=1e-5)
        assert ours == pytest.approx(trained.logprobs, abs=0.5)
        assert ours != pytest.approx(trained.logprobs, abs=1e-4)

"""Trainer and sampler on two hosts that share an object store alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import mint
from checkpoint_store import CheckpointStore, open_store
from mint import types
from tests.checkpoint_files import moments
from tests.object_servers import ObjectServer
from tests.servers import running_sampler, running_trainer

LIMIT_S = 120.0
ADAM = types.AdamParams(learning_rate=0.05)
PROMPT = types.ModelInput.from_ints([9, 8, 7, 6])
PARAMS = types.SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def store(object_server: ObjectServer) -> str:
    return object_server.store()


@pytest.fixture(scope="module")
def client(
    qwen3_folder: Path, store: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[mint.ServiceClient]:
    ours, theirs = (tmp_path_factory.mktemp(host) for host in ("trainer", "sampler"))

    def flags(host: Path) -> dict[str, object]:
        memory = host / "memory"
        return {"local_folder": host / "beside", "snapshot_memory_folder": memory}

    with (
        running_sampler(qwen3_folder, store, base_model_name="tiny", **flags(theirs)) as sampler,
        running_trainer(
            qwen3_folder,
            store,
            base_model_name="tiny",
            sampler_address=sampler.address,
            **flags(ours),
        ) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        yield service
        assert (ours / "beside" / ".state" / "journal.db").exists()


def step(run: mint.TrainingClient) -> None:
    inputs = {"target_tokens": np.array([6, 7, 8, 9]), "weights": np.ones(4, np.float32)}
    run.forward_backward([types.Datum(types.ModelInput.from_ints([5, 6, 7, 8]), inputs)])
    run.optim_step(ADAM).result(LIMIT_S)


def tokens(sampler: mint.SamplingClient) -> list[int]:
    answer = sampler.sample(PROMPT, num_samples=1, sampling_params=PARAMS)
    return list(answer.result(LIMIT_S).sequences[0].tokens)


def weights(store: CheckpointStore, path: str) -> dict[str, np.ndarray]:
    return dict(store.open(path, tenant="default").weights())


def test_what_one_host_saves_another_samples_and_a_third_reads(
    client: mint.ServiceClient, store: str, tmp_path: Path
) -> None:
    run = client.create_lora_training_client("tiny", rank=4)
    step(run)
    step(run)
    unnamed = run.save_weights_and_get_sampling_client()
    named = run.save_weights_for_sampler("a").result(LIMIT_S)
    state = run.save_state("s").result(LIMIT_S)

    trained = tokens(client.create_sampling_client(model_path=named.path))
    assert tokens(unnamed) == trained
    assert tokens(client.create_sampling_client(base_model="tiny")) != trained

    third = open_store(store, tmp_path / "third", saves=False)
    saved = weights(third, named.path)
    assert moments(third.open(state.path, tenant="default"))[1]
    step(run)
    run.load_state_with_optimizer(state.path).result(LIMIT_S)
    again = weights(third, run.save_weights_for_sampler("a").result(LIMIT_S).revision_path)
    assert all(np.array_equal(saved[name], again[name]) for name in saved)


def test_checkpoints_are_managed_as_in_a_folder(
    client: mint.ServiceClient, qwen3_folder: Path, store: str, tmp_path: Path
) -> None:
    rest = client.create_rest_client()
    run = client.create_lora_training_client("tiny", rank=4)
    step(run)
    state = run.save_state("half").result(LIMIT_S)

    copy = rest.copy_checkpoint(state.path, "kept").result(LIMIT_S)
    down = rest.download_checkpoint(copy.path, tmp_path / "state").result(LIMIT_S)
    up = rest.upload_checkpoint(down, "half", with_optimizer=True).result(LIMIT_S)
    continued = client.create_training_client_from_state_with_optimizer(up.path)
    step(run)
    step(continued)
    theirs, ours = (
        one.save_weights_for_sampler("end").result(LIMIT_S).path for one in (run, continued)
    )
    export = rest.export_checkpoint(ours).result(LIMIT_S)
    merged = rest.download_checkpoint(export.path, tmp_path / "merged").result(LIMIT_S)
    kept = rest.copy_checkpoint(ours, "kept").result(LIMIT_S)
    listed = rest.list_checkpoints(run.training_run_id).result(LIMIT_S).checkpoints
    rest.delete_checkpoint_from_tinker_path(state.path).result(LIMIT_S)

    third = open_store(store, tmp_path / "third", saves=False)
    expected = weights(third, theirs)
    for path in (ours, kept.path):
        got = weights(third, path)
        assert all(np.array_equal(expected[name], got[name]) for name in expected)
    assert {each.path for each in listed} == {state.path, copy.path, theirs}
    with pytest.raises(mint.NotFoundError):
        rest.get_checkpoint(state.path).result(LIMIT_S)
    assert rest.get_checkpoint(copy.path).result(LIMIT_S).source_path == f"{state.path}@1"
    scored = client.create_sampling_client(model_path=ours).compute_logprobs(PROMPT)
    prompt = torch.tensor([PROMPT.to_ints()])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merged)(prompt).logits[0, :-1]
    logprobs = logits.log_softmax(-1).gather(1, prompt[0, 1:, None])[:, 0]
    assert scored.result(LIMIT_S)[1:] == pytest.approx(logprobs.tolist(), rel=1e-5, abs=1e-5)

"""Checkpoints come as folders that PEFT opens."""

import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest

import mint
from mint import types
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from tests.peft_folders import PROMPT, peft_logprobs
from tests.services import Services
from tests.trainer_rpc import CALL_LIMIT_S, Refusal, refusal

Download = checkpoint_pb2.DownloadCheckpointRequest


@pytest.fixture(scope="module")
def training(module_service: mint.ServiceClient) -> mint.TrainingClient:
    """A run after two steps."""
    training = module_service.create_lora_training_client(rank=8, seed=1)
    inputs = {"target_tokens": list(PROMPT[1:])}
    datum = types.Datum(types.ModelInput.from_ints(PROMPT[:-1]), inputs)
    for _ in range(2):
        training.forward_backward([datum])
        training.optim_step(types.AdamParams(learning_rate=0.01)).result(60)
    return training


@pytest.fixture(scope="module")
def state(training: mint.TrainingClient) -> str:
    return training.save_state("downloads").result(60).revision_path


@pytest.mark.parametrize("name", ["adapter", None])
def test_a_download_opens_in_peft_with_the_samplers_logits(
    name: str | None,
    services: Services,
    service: mint.ServiceClient,
    training: mint.TrainingClient,
    tmp_path: Path,
) -> None:
    path = training.save_weights_for_sampler(name).result(60).path
    prompt = types.ModelInput.from_ints(PROMPT)
    expected = service.create_sampling_client(path).compute_logprobs(prompt).result(60)

    folder = service.create_rest_client().download_checkpoint(path, tmp_path / "here").result(60)

    assert folder == tmp_path / "here"
    assert peft_logprobs(services.model, folder) == pytest.approx(expected[1:], rel=1e-5, abs=1e-5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


def test_progress_ends_with_every_byte(
    service: mint.ServiceClient, state: str, tmp_path: Path
) -> None:
    rest = service.create_rest_client()
    told: list[tuple[int, int]] = []

    folder = rest.download_checkpoint(
        state, tmp_path / "here", progress=lambda done, total: told.append((done, total))
    ).result(60)

    size = rest.get_checkpoint(state).result(60).size_bytes
    assert told == sorted(told)
    assert told[-1] == (size, size)
    assert sum(file.stat().st_size for file in folder.iterdir()) == size
    rest.download_checkpoint(state, tmp_path / "bar", progress=True).result(60)


def test_a_folder_that_holds_something_is_left_alone(
    service: mint.ServiceClient, state: str, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("notes")
    rest = service.create_rest_client()
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(mint.InvalidInputError, match="not an empty folder"):
            rest.download_checkpoint(state, folder).result(60)
    assert (tmp_path / "mine").read_text() == "notes"


def test_an_unfinished_download_is_gone_on_with(
    services: Services, service: mint.ServiceClient, state: str, tmp_path: Path
) -> None:
    rest = service.create_rest_client()

    def leave(done: int, total: int) -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rest.download_checkpoint(state, tmp_path / "here", progress=leave).result(60)
    (part,) = tmp_path.iterdir()
    arrived = sum(file.stat().st_size for file in part.iterdir())
    assert arrived > 0

    told: list[int] = []
    folder = rest.download_checkpoint(
        state, tmp_path / "here", progress=lambda done, total: told.append(done)
    ).result(60)

    assert {entry.name for entry in tmp_path.iterdir()} == {"here"}
    for file in rest.get_checkpoint(state).result(60).files:
        assert hashlib.sha256((folder / file.name).read_bytes()).hexdigest() == file.sha256


def test_any_part_of_a_file_can_be_asked_for(services: Services, state: str) -> None:
    with grpc.insecure_channel(services.trainer) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        whole: dict[str, bytes] = {}
        for message in stub.DownloadCheckpoint(Download(path=state), timeout=CALL_LIMIT_S):
            name = message.file.name
            assert message.offset_bytes == len(whole.setdefault(name, b""))
            whole[name] += message.data
        for name, content in whole.items():
            for offset in (0, 1, len(content) - 1, len(content)):
                request = Download(path=state, file_name=name, offset_bytes=offset)
                found = list(stub.DownloadCheckpoint(request, timeout=CALL_LIMIT_S))
                assert b"".join(message.data for message in found) == content[offset:]
                assert found[0].offset_bytes == offset


def test_what_is_not_there_is_named(services: Services, state: str) -> None:
    size = 10**9
    unknown = refused_stream(services, path=state, file_name="README.md")
    assert (unknown.code, unknown.reason) == (
        grpc.StatusCode.NOT_FOUND,
        "CHECKPOINT_FILE_NOT_FOUND",
    )
    assert "it has adapter_config.json, adapter_model.safetensors" in unknown.message
    for wanted, field in (
        ({"file_name": "adapter_config.json", "offset_bytes": size}, "offset_bytes"),
        ({"file_name": "adapter_config.json", "offset_bytes": -1}, "offset_bytes"),
        ({"offset_bytes": 5}, "file_name"),
    ):
        error = refused_stream(services, path=state, **wanted)
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def refused_stream(services: Services, **fields: Any) -> Refusal:
    with grpc.insecure_channel(services.trainer) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.DownloadCheckpoint(Download(**fields), timeout=CALL_LIMIT_S))
    return refusal(caught.value)

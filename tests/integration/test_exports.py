"""Merged models open in transformers, and compute what PEFT computes."""

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mint
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from tests.peft_folders import logprobs_of, peft_logprobs, save_adapter
from tests.servers import running_trainer
from tests.services import SERVED_NAME, Services

LIMIT_S = 120.0


@pytest.fixture
def rest(service: mint.ServiceClient) -> mint.RestClient:
    return service.create_rest_client()


@pytest.fixture(scope="module")
def untied(
    llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[mint.RestClient]:
    """Of a trainer whose base model has a head of its own."""
    store = tmp_path_factory.mktemp("store")
    with (
        running_trainer(llama_folder, store, base_model_name="llama") as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        yield service.create_rest_client()


def uploaded(rest: mint.RestClient, base: Path, folder: Path, name: str, **config: Any) -> str:
    save_adapter(base, folder, **config)
    return rest.upload_checkpoint(folder, "a", base_model=name).result(LIMIT_S).path


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def test_a_tied_head_with_an_adapter_is_untied_and_says_so(
    rest: mint.RestClient, services: Services, tmp_path: Path
) -> None:
    config = {"r": 4, "use_rslora": True, "target_modules": ["lm_head", "q_proj", "down_proj"]}
    path = uploaded(rest, services.model, tmp_path / "theirs", SERVED_NAME, **config)

    export = rest.export_checkpoint(path).result(LIMIT_S)
    folder = rest.download_checkpoint(export.path, tmp_path / "merged").result(LIMIT_S)

    assert export.head_untied
    assert export.checkpoint.checkpoint_type == "merged"
    assert export.checkpoint.source_path == f"{path}@1"
    assert export.checkpoint.expire_time is not None
    model = opened(folder)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    expected = peft_logprobs(services.model, tmp_path / "theirs")
    assert logprobs_of(model) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    theirs = AutoTokenizer.from_pretrained(services.model)
    assert AutoTokenizer.from_pretrained(folder)("one two").input_ids == theirs("one two").input_ids


def test_a_tied_head_without_an_adapter_stays_tied(
    rest: mint.RestClient, services: Services, tmp_path: Path
) -> None:
    path = uploaded(rest, services.model, tmp_path / "theirs", SERVED_NAME)

    export = rest.export_checkpoint(path, "bfloat16", ttl_seconds=3600).result(LIMIT_S)
    folder = rest.download_checkpoint(export.path, tmp_path / "merged").result(LIMIT_S)

    assert not export.head_untied
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    expected = peft_logprobs(services.model, tmp_path / "theirs")
    assert logprobs_of(opened(folder).float()) == pytest.approx(expected, abs=0.05)


def test_a_head_of_its_own_is_merged_like_any_layer(
    untied: mint.RestClient, llama_folder: Path, tmp_path: Path
) -> None:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "gate_proj"]}
    path = uploaded(untied, llama_folder, tmp_path / "theirs", "llama", **config)

    export = untied.export_checkpoint(path).result(LIMIT_S)
    folder = untied.download_checkpoint(export.path, tmp_path / "merged").result(LIMIT_S)

    assert not export.head_untied
    expected = peft_logprobs(llama_folder, tmp_path / "theirs")
    assert logprobs_of(opened(folder)) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_tenant_has_so_many_exports_under_way(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "quotas").write_text("exports = 1")
    with (
        running_trainer(
            llama_folder, tmp_path, base_model_name="llama", quotas=tmp_path / "quotas"
        ) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        rest = service.create_rest_client()
        path = uploaded(rest, llama_folder, tmp_path / "theirs", "llama")
        with grpc.insecure_channel(trainer.address) as channel:
            stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
            requests = [
                checkpoint_pb2.ExportCheckpointRequest(path=path, request_id=str(number))
                for number in range(3)
            ]
            calls = [stub.ExportCheckpoint.future(request, timeout=LIMIT_S) for request in requests]
            codes = Counter(call.code() for call in calls)

            assert codes == {grpc.StatusCode.OK: 1, grpc.StatusCode.RESOURCE_EXHAUSTED: 2}
            assert stub.ExportCheckpoint(requests[2], timeout=LIMIT_S).path.startswith("mint://")


def test_an_export_sent_twice_is_made_once(
    rest: mint.RestClient, services: Services, tmp_path: Path
) -> None:
    path = uploaded(rest, services.model, tmp_path / "theirs", SERVED_NAME)
    request = checkpoint_pb2.ExportCheckpointRequest(path=path, request_id="once")
    with grpc.insecure_channel(services.trainer) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        calls = [stub.ExportCheckpoint.future(request, timeout=LIMIT_S) for _ in range(2)]
        first, second = (call.result() for call in calls)

    assert first == second
    assert first.path.endswith("@1")
    run = first.checkpoint.training_run_id
    found = rest.list_user_checkpoints(training_run_id=run, checkpoint_type="merged").result(60)
    assert [checkpoint.revision_path for checkpoint in found.checkpoints] == [first.path]


def test_one_question_has_one_answer_however_often_it_is_asked(
    rest: mint.RestClient, services: Services, tmp_path: Path
) -> None:
    path = uploaded(rest, services.model, tmp_path / "theirs", SERVED_NAME)
    with grpc.insecure_channel(services.trainer) as channel:
        export = checkpoint_pb2_grpc.CheckpointServiceStub(channel).ExportCheckpoint

        def asked(path: str, ttl_s: int = 60, **said: Any) -> Any:
            request = checkpoint_pb2.ExportCheckpointRequest(
                path=path, request_id=uuid.uuid4().hex, **said
            )
            request.ttl.FromSeconds(ttl_s)
            return export.future(request, timeout=LIMIT_S)

        together = [asked(path) for _ in range(3)]
        first, *others = [call.result() for call in together]
        later = asked(f"{path}@1", 3600).result()
        half = asked(path, dtype=checkpoint_pb2.EXPORT_DTYPE_BFLOAT16).result()

    assert {other.path for other in (*others, later)} == {first.path}
    lifetime = later.checkpoint.expire_time.ToSeconds() - first.checkpoint.expire_time.ToSeconds()
    assert 3500 < lifetime < 3600  # as long as the last has asked for
    assert half.path != first.path


def test_who_was_cut_off_asks_how_far_it_is_and_has_the_answer(
    rest: mint.RestClient, services: Services, tmp_path: Path
) -> None:
    path = uploaded(rest, services.model, tmp_path / "theirs", SERVED_NAME)
    staging = services.store / ".staging"
    request = checkpoint_pb2.ExportCheckpointRequest(path=path, request_id="cut off")
    named = checkpoint_pb2.GetExportRequest(request_id="cut off")
    with grpc.insecure_channel(services.trainer) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        call = stub.ExportCheckpoint.future(request, timeout=LIMIT_S)
        until(lambda: any(staging.iterdir()))
        call.cancel()
        assert stub.GetExport(named).state == checkpoint_pb2.EXPORT_STATE_MERGING
        answer = stub.ExportCheckpoint(request, timeout=LIMIT_S)
        told = stub.GetExport(named)

    assert told.state == checkpoint_pb2.EXPORT_STATE_DONE
    assert told.export == answer
    assert told.written_bytes == sum(file.size_bytes for file in answer.files)
    assert answer.path.endswith("@1")  # it was made once


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_cannot_be_exported_or_used_as_an_adapter(
    rest: mint.RestClient, services: Services, service: mint.ServiceClient, tmp_path: Path
) -> None:
    training = service.create_lora_training_client(rank=2)
    snapshot = training.save_weights_for_sampler(None).result(60).path
    with pytest.raises(mint.BadRequestError, match="copy it under a name"):
        rest.export_checkpoint(snapshot).result(60)
    merged = f"mint://{training.training_run_id}/merged_weights/a"
    with pytest.raises(mint.BadRequestError, match="merged model already"):
        rest.export_checkpoint(merged).result(60)
    with pytest.raises(mint.BadRequestError, match="is a merged model"):
        training.load_state(merged).result(60)
    with pytest.raises(mint.APIStatusError, match="sampler_weights"):
        service.create_sampling_client(merged).compute_logprobs(
            mint.types.ModelInput.from_ints([5, 6])
        ).result(60)
    with pytest.raises(mint.NotFoundError):
        rest.export_checkpoint(f"mint://{training.training_run_id}/weights/a").result(60)


def test_what_float16_cannot_hold_is_refused_by_name_with_a_way_out(
    rest: mint.RestClient, services: Services, tmp_path: Path
) -> None:
    """Its largest number is 65,504."""
    config = {"r": 4, "lora_alpha": 1e9, "target_modules": ["q_proj", "down_proj"]}
    path = uploaded(rest, services.model, tmp_path / "theirs", SERVED_NAME, **config)

    with pytest.raises(mint.APIStatusError, match=r"q_proj.*float16.*bfloat16 or float32") as found:
        rest.export_checkpoint(path, dtype="float16").result(LIMIT_S)

    assert found.value.reason == "EXPORT_NOT_FINITE"
    assert int(found.value.metadata["count"]) == 4
    exported = rest.export_checkpoint(path, dtype="bfloat16").result(LIMIT_S)
    folder = rest.download_checkpoint(exported.path, tmp_path / "merged").result(LIMIT_S)
    (file,) = folder.glob("*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())

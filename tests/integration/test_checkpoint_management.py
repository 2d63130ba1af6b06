"""Checkpoints are listed, described, changed, copied and deleted."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import mint
from mint import types
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from tests.integration.conftest import KeyedTrainer
from tests.servers import running_trainer
from tests.services import SERVED_NAME, Services
from tests.trainer_rpc import CALL_LIMIT_S, create, refused

ADAM = types.AdamParams(learning_rate=0.01)
DATUM = types.Datum(types.ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8]})


@pytest.fixture
def rest(service: mint.ServiceClient) -> mint.RestClient:
    return service.create_rest_client()


@pytest.fixture
def training(service: mint.ServiceClient) -> mint.TrainingClient:
    return service.create_lora_training_client(rank=4, seed=1, alpha=8.0)


def folder_of(services: Services, path: str) -> Path:
    name, _, revision = path.removeprefix("mint://").partition("@")
    return services.store / name / revision


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + CALL_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # nothing tells of a file's end


def test_a_checkpoint_is_described(rest: mint.RestClient, training: mint.TrainingClient) -> None:
    training.forward_backward([DATUM])
    training.optim_step(ADAM)
    saved = training.save_state("a", ttl_seconds=7200, user_metadata={"k": "v"}).result(60)

    checkpoint = rest.get_checkpoint(saved.path).result(60)

    assert checkpoint == rest.get_checkpoint(saved.revision_path).result(60)
    assert (checkpoint.path, checkpoint.revision_path) == (saved.path, saved.revision_path)
    assert (checkpoint.checkpoint_type, checkpoint.checkpoint_id) == ("training", "weights/a")
    assert (checkpoint.training_run_id, checkpoint.step) == (training.training_run_id, 1)
    assert checkpoint.lora_config.alpha == 8.0
    assert checkpoint.metadata == checkpoint.user_metadata == {"k": "v"}
    assert checkpoint.size_bytes == sum(file.size_bytes for file in checkpoint.files)
    assert {file.name for file in checkpoint.files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
    }
    assert checkpoint.expires_at is not None
    assert 7190 < (checkpoint.expires_at - checkpoint.time).total_seconds() <= 7200

    info = rest.get_weights_info_by_tinker_path(saved.path).result(60)
    assert (info.base_model, info.lora_rank, info.is_lora) == (SERVED_NAME, 4, True)
    assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, True, True)
    run = rest.get_training_run_by_tinker_path(saved.path).result(60)
    assert run.training_run_id == training.training_run_id


def test_an_unnamed_snapshot_is_described_and_unlisted(
    rest: mint.RestClient, training: mint.TrainingClient
) -> None:
    path = training.save_weights_for_sampler(None).result(60).path

    assert rest.get_checkpoint(path).result(60).checkpoint_type == "sampler"
    assert rest.list_checkpoints(training.training_run_id).result(60).checkpoints == []
    with pytest.raises(mint.BadRequestError, match="copy it under a name"):
        rest.set_checkpoint_ttl_from_tinker_path(path, 60).result(60)


def test_lists_have_pages_and_filters(
    rest: mint.RestClient, service: mint.ServiceClient, training: mint.TrainingClient
) -> None:
    run = training.training_run_id
    for name in ("a", "b"):
        training.save_state(name, user_metadata={"of": run, "name": name}).result(60)
        training.save_weights_for_sampler(name, user_metadata={"of": run}).result(60)
    training.save_weights_for_sampler("a", user_metadata={"of": run}).result(60)
    other = service.create_lora_training_client(rank=4)
    other.save_state("a").result(60)

    def ids(**filters: Any) -> list[str]:
        found = rest.list_user_checkpoints(**filters).result(60).checkpoints
        return [checkpoint.checkpoint_id for checkpoint in found]

    everything = ["sampler_weights/a", "sampler_weights/b", "weights/b", "weights/a"]
    of_run = rest.list_checkpoints(run).result(60)
    assert [checkpoint.checkpoint_id for checkpoint in of_run.checkpoints] == everything
    assert of_run.checkpoints[0].revision_path.endswith("@2")
    assert of_run.cursor is None
    assert ids(training_run_id=run) == ids(metadata_filter={"of": run}) == everything
    assert ids(training_run_id=run, checkpoint_type="training") == ["weights/b", "weights/a"]
    assert ids(training_run_id=run, metadata_filter={"name": "a"}) == ["weights/a"]
    assert ids(training_run_id=run, checkpoint_type="merged") == []
    page = rest.list_user_checkpoints(2, 1, training_run_id=run).result(60)
    assert [checkpoint.checkpoint_id for checkpoint in page.checkpoints] == everything[1:3]
    assert page.cursor == types.Cursor(offset=1, limit=2, total_count=4)
    assert ids(limit=1) == ["weights/a"]  # the other run's, of all the newest


def test_runs_are_listed_with_a_cursor(rest: mint.RestClient, service: mint.ServiceClient) -> None:
    made = [
        service.create_lora_training_client(rank=1, user_metadata={"cursor": "yes"}).model_id
        for _ in range(3)
    ]

    page = rest.list_training_runs(2, 1, metadata_filter={"cursor": "yes"}).result(60)

    assert [run.training_run_id for run in page.training_runs] == [made[1], made[0]]
    assert page.cursor == types.Cursor(offset=1, limit=2, total_count=3)
    uploaded = rest.list_training_runs(metadata_filter={"cursor": "yes"}, kind="uploaded").result(
        60
    )
    assert uploaded.training_runs == []


def test_runs_are_changed_and_deleted_with_their_checkpoints(
    rest: mint.RestClient, training: mint.TrainingClient
) -> None:
    run = training.training_run_id
    path = training.save_state("a").result(60).path

    changed = rest.update_training_run(run, {"a": "b"}).result(60)
    assert changed.user_metadata == {"a": "b"}
    rest.delete_training_run(run, delete_checkpoints=True).result(60)

    for gone in (rest.get_training_run(run), rest.get_checkpoint(path)):
        with pytest.raises(mint.NotFoundError):
            gone.result(60)


def test_named_checkpoints_outlive_their_run(
    rest: mint.RestClient, service: mint.ServiceClient, training: mint.TrainingClient
) -> None:
    run = training.training_run_id
    named = training.save_state("a").result(60).path
    unnamed = training.save_weights_for_sampler(None).result(60).path

    rest.delete_training_run(run).result(60)

    assert service.create_training_client_from_state(named).training_run.lora_rank == 4
    with pytest.raises(mint.NotFoundError):
        rest.get_checkpoint(unnamed).result(60)
    found = rest.list_checkpoints(run).result(60).checkpoints
    assert [checkpoint.path for checkpoint in found] == [named]
    rest.delete_checkpoint(run, "weights/a").result(60)
    assert rest.list_checkpoints(run).result(60).checkpoints == []


def test_what_has_expired_is_removed_from_the_disk(
    rest: mint.RestClient, services: Services, training: mint.TrainingClient
) -> None:
    at_once = training.save_state("soon", ttl_seconds=1.5).result(60).revision_path
    later = training.save_weights_for_sampler("later").result(60).revision_path
    kept = training.save_state("kept", ttl_seconds=1.5).result(60).revision_path
    rest.set_checkpoint_ttl_from_tinker_path(later, 1.5).result(60)
    changed = rest.set_checkpoint_ttl_from_tinker_path(kept, None).result(60)
    assert changed.expire_time is None

    for path in (at_once, later):
        folder = folder_of(services, path)
        until(lambda folder=folder: [file.name for file in folder.iterdir()] == ["deleted"])  # type: ignore[misc]
        with pytest.raises(mint.NotFoundError):
            rest.get_checkpoint(path).result(60)
    assert (folder_of(services, kept) / "optimizer.safetensors").exists()


def test_metadata_are_replaced_and_files_stay(
    rest: mint.RestClient, service: mint.ServiceClient, training: mint.TrainingClient
) -> None:
    path = training.save_state("a", ttl_seconds=3600, user_metadata={"a": "b"}).result(60).path
    before = rest.get_checkpoint(path).result(60)

    changed = rest.set_checkpoint_metadata(path, {"c": "d"}).result(60)

    assert changed == rest.get_checkpoint(path).result(60)
    assert changed.metadata == {"c": "d"}
    assert (changed.files, changed.expire_time) == (before.files, before.expire_time)
    service.create_training_client_from_state_with_optimizer(path)


def test_a_copy_shares_storage_and_lives_on_its_own(
    rest: mint.RestClient,
    services: Services,
    service: mint.ServiceClient,
    training: mint.TrainingClient,
) -> None:
    saved = training.save_state("a", user_metadata={"k": "v"}).result(60)

    copy = rest.copy_checkpoint(saved.path, "b").result(60)
    drawn = service.copy_weights(saved.revision_path, ttl_seconds=3600).result(60)

    assert copy.path == saved.path.removesuffix("a") + "b"
    assert (copy.source_path, copy.metadata) == (saved.revision_path, {"k": "v"})
    assert rest.get_checkpoint(drawn).result(60).expire_time is not None
    weights = folder_of(services, saved.revision_path) / "adapter_model.safetensors"
    assert weights.stat().st_nlink == 3
    with pytest.raises(mint.ConflictError, match="exists"):
        rest.copy_checkpoint(saved.path, "b").result(60)
    rest.delete_checkpoint_from_tinker_path(saved.path).result(60)
    continued = service.create_training_client_from_state_with_optimizer(copy.path)
    assert continued.training_run.lora_rank == 4


def test_a_copy_of_a_snapshot_has_a_name_and_is_kept(
    rest: mint.RestClient, service: mint.ServiceClient, training: mint.TrainingClient
) -> None:
    prompt = types.ModelInput.from_ints([5, 6, 7])
    path = training.save_weights_for_sampler(None).result(60).path

    copy = rest.copy_checkpoint(path, "kept").result(60)

    assert copy.checkpoint_id == "sampler_weights/kept"
    one, other = (
        service.create_sampling_client(each).compute_logprobs(prompt).result(60)
        for each in (path, copy.path)
    )
    assert one == other


def test_a_revision_is_deleted_or_all_of_a_name(
    rest: mint.RestClient, services: Services, training: mint.TrainingClient
) -> None:
    first, second, third = (
        training.save_weights_for_sampler("a").result(60).revision_path for _ in range(3)
    )
    path = first.partition("@")[0]

    rest.delete_checkpoint_from_tinker_path(third).result(60)
    assert rest.get_checkpoint(path).result(60).revision_path == second
    rest.delete_checkpoint_from_tinker_path(path).result(60)

    for gone in (path, first, second, third):
        with pytest.raises(mint.NotFoundError):
            rest.get_checkpoint(gone).result(60)
        with pytest.raises(mint.NotFoundError):
            rest.delete_checkpoint_from_tinker_path(gone).result(60)
    assert not list(folder_of(services, path).rglob("*.safetensors"))


def test_a_snapshot_in_memory_is_deleted_too(
    rest: mint.RestClient, service: mint.ServiceClient, training: mint.TrainingClient
) -> None:
    path = training.save_weights_for_sampler(None).result(60).path

    rest.delete_checkpoint_from_tinker_path(path).result(60)

    with pytest.raises(mint.NotFoundError):
        rest.get_checkpoint(path).result(60)
    with pytest.raises(mint.NotFoundError):
        service.create_training_client_from_state(path)


async def test_every_verb_can_be_awaited(
    rest: mint.RestClient, training: mint.TrainingClient, tmp_path: Path
) -> None:
    saved = await (await training.save_state_async("a"))
    run = training.training_run_id

    assert (await rest.get_checkpoint(saved.path)).path == saved.path
    assert (await rest.get_checkpoint_async(saved.path)).path == saved.path
    assert len((await rest.list_checkpoints_async(run)).checkpoints) == 1
    assert (await rest.get_training_run_async(run)).lora_rank == 4
    copy = await rest.copy_checkpoint_async(saved.path, "b")
    folder = await rest.download_checkpoint_async(copy.path, tmp_path / "here")
    assert (folder / "adapter_config.json").exists()
    await rest.delete_checkpoint_async(run, "weights/b")


PB2 = checkpoint_pb2


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("GetCheckpoint", PB2.GetCheckpointRequest(path="mint://x"), "path"),
        ("ListCheckpoints", PB2.ListCheckpointsRequest(page_size=-1), "page_size"),
        ("ListCheckpoints", PB2.ListCheckpointsRequest(page_token="x"), "page_token"),
        ("ListCheckpoints", PB2.ListCheckpointsRequest(kind=77), "kind"),  # type: ignore[arg-type]
        ("ListCheckpoints", PB2.ListCheckpointsRequest(training_run_id="a/b"), "training_run_id"),
        ("UpdateCheckpoint", PB2.UpdateCheckpointRequest(request_id="i"), "metadata"),
        ("UpdateCheckpoint", PB2.UpdateCheckpointRequest(keep=False), "keep"),
        ("CopyCheckpoint", PB2.CopyCheckpointRequest(request_id="i", name="../x"), "name"),
        ("CopyCheckpoint", PB2.CopyCheckpointRequest(name="x"), "request_id"),
        ("DeleteCheckpoint", PB2.DeleteCheckpointRequest(), "request_id"),
        ("ExportCheckpoint", PB2.ExportCheckpointRequest(), "request_id"),
    ],
)
def test_bad_requests_name_their_field(
    services: Services, method: str, request_: Any, field: str
) -> None:
    if not request_.DESCRIPTOR.name.startswith(("List", "Get")):
        request_.path = "mint://run-1/weights/a"
    with grpc.insecure_channel(services.trainer) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        error = refused(getattr(stub, method), request_)

    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_a_tenant_manages_its_own_checkpoints_alone(keyed_trainer: KeyedTrainer) -> None:
    run = create(keyed_trainer.stub, keyed_trainer.options("ann"))
    path = run.send(run.save_state("mine")).path
    bob, ann = keyed_trainer.options("bob"), keyed_trainer.options("ann")
    with grpc.insecure_channel(keyed_trainer.service.address) as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        asked = {"path": path, "request_id": "one"}
        for method, request in (
            (stub.GetCheckpoint, PB2.GetCheckpointRequest(path=path)),
            (stub.UpdateCheckpoint, PB2.UpdateCheckpointRequest(**asked, keep=True)),
            (stub.CopyCheckpoint, PB2.CopyCheckpointRequest(**asked, name="b")),
            (stub.DeleteCheckpoint, PB2.DeleteCheckpointRequest(**asked)),
            (stub.ExportCheckpoint, PB2.ExportCheckpointRequest(**asked)),
            (drained(stub.DownloadCheckpoint), PB2.DownloadCheckpointRequest(path=path)),
        ):
            error = refused(method, request, **bob)
            assert (error.code, error.reason) == (
                grpc.StatusCode.NOT_FOUND,
                "CHECKPOINT_NOT_FOUND",
            )
        everything = PB2.ListCheckpointsRequest()
        assert not stub.ListCheckpoints(everything, **bob).checkpoints
        assert [c.path for c in stub.ListCheckpoints(everything, **ann).checkpoints] == [path]


def drained(stream: Any) -> Callable[..., list[Any]]:
    return lambda request, **options: list(stream(request, **options))


def test_requests_act_once_through_a_restart(qwen3_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    copying = PB2.CopyCheckpointRequest(request_id="copy", name="copy")
    deleting = PB2.DeleteCheckpointRequest(request_id="delete")
    with (
        running_trainer(qwen3_folder, store, base_model_name="tiny") as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
        grpc.insecure_channel(trainer.address) as channel,
    ):
        training = service.create_lora_training_client(rank=2)
        service.update_training_run(training.model_id, {"kept": "yes"})
        service.delete_training_run(service.create_lora_training_client(rank=2).model_id)
        copying.path = training.save_state("a").result(60).path
        deleting.path = training.save_state("b").result(60).path
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        copied = stub.CopyCheckpoint(copying).checkpoint
        assert stub.CopyCheckpoint(copying).checkpoint == copied
        stub.DeleteCheckpoint(deleting)
        stub.DeleteCheckpoint(deleting)
        newer = training.save_state("b").result(60).revision_path
    with (
        running_trainer(qwen3_folder, store, base_model_name="tiny") as trainer,
        mint.RestClient(base_url=trainer.address) as rest,
        grpc.insecure_channel(trainer.address) as channel,
    ):
        runs = rest.list_training_runs(metadata_filter={"kept": "yes"}).result(60)
        assert [run.training_run_id for run in runs.training_runs] == [training.model_id]
        assert len(rest.list_training_runs().result(60).training_runs) == 1
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        assert stub.CopyCheckpoint(copying).checkpoint == copied
        stub.DeleteCheckpoint(deleting)  # deletes what it has deleted, and nothing since
        left = stub.ListCheckpoints(PB2.ListCheckpointsRequest()).checkpoints
    assert {c.revision_path for c in left} >= {newer, copied.revision_path}
    assert len(left) == 3


def test_names_that_make_no_sense_here_are_refused(rest: mint.RestClient) -> None:
    path = "mint://run-1/weights/a"
    for call in (
        lambda: rest.copy_weights(path, "project"),  # type: ignore[arg-type]
        lambda: rest.copy_weights(path, weights_access_token="t"),  # type: ignore[arg-type]
        lambda: rest.get_training_run("run-1", "everything"),  # type: ignore[arg-type]
        lambda: rest.list_user_checkpoints(0),
        lambda: rest.list_user_checkpoints(checkpoint_type="external"),  # type: ignore[arg-type]
        lambda: rest.list_training_runs(kind="lent"),  # type: ignore[arg-type]
        lambda: rest.delete_checkpoint("run-1", "a"),
        lambda: rest.export_checkpoint(path, "int4"),  # type: ignore[arg-type]
        lambda: rest.set_checkpoint_ttl_from_tinker_path(path, -1),
        lambda: rest.download_checkpoint(path, "x", progress="yes"),  # type: ignore[arg-type]
    ):
        with pytest.raises(mint.InvalidInputError):
            call()

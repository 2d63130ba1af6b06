"""From the trainer's weights to the sampler's tokens, by memory on one host and by the store."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from checkpoint_store import CheckpointStore, parse_path
from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc, types_pb2
from tests.keys import make_key
from tests.samplers import DEADLINE_S, Sampler, connected, refusal, sample_request, tokens_of
from tests.servers import (
    RunningService,
    running_sampler,
    running_summing_trainer,
    running_trainer,
)
from tests.trainer_rpc import RawRun, create, datum
from tests.warm import children

ADAM = types_pb2.AdamParams(learning_rate=0.05)


@dataclass(frozen=True, slots=True)
class Host:
    """Both services on one host, with their own memory."""

    root: Path
    trainer: RunningService
    stub: trainer_pb2_grpc.TrainerServiceStub
    sampler: Sampler

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.root / "store")


@contextmanager
def training(model: Path, root: Path, **flags: object) -> Iterator[RunningService]:
    settings = {"base_model_name": "tiny", "snapshot_memory_folder": root / "memory", **flags}
    with running_trainer(model, root / "store", **settings) as service:
        yield service


@contextmanager
def sampling(model: Path, root: Path, key: str = "", **flags: object) -> Iterator[Sampler]:
    settings = {"base_model_name": "tiny", "snapshot_memory_folder": root / "memory", **flags}
    with (
        running_sampler(model, root / "store", **settings) as service,
        connected(service, root / "store", key) as sampler,
    ):
        yield sampler


@pytest.fixture(scope="module")
def host(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    root = tmp_path_factory.mktemp("host")
    with (
        training(qwen3_folder, root) as trainer,
        sampling(qwen3_folder, root) as sampler,
        grpc.insecure_channel(trainer.address) as channel,
    ):
        yield Host(root, trainer, trainer_pb2_grpc.TrainerServiceStub(channel), sampler)


def step(run: RawRun) -> None:
    run.send(run.forward_backward(datum([5, 6, 7, 8, 9])))
    run.send(run.optim_step(adam_params=ADAM))


def publish(run: RawRun, name: str = "") -> str:
    answer = run.send(run.save_for_sampler(name))
    return str(answer.revision_path)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # nothing tells of a file's appearance, or of its end


def test_a_snapshot_is_sampled_from_memory(host: Host) -> None:
    run = create(host.stub)
    step(run)
    path = publish(run)
    tokens = tokens_of(host.sampler.sample(model_path=path))

    log = host.sampler.service.log_text()
    assert f"adapter loaded path={path}" in log
    assert f"adapter fetched path={path}" not in log
    named = publish(run, "same")
    assert tokens_of(host.sampler.sample(model_path=named)) == tokens
    assert f"adapter fetched path={named}" not in host.sampler.service.log_text()


def test_another_host_waits_for_the_store_and_samples_the_same(
    host: Host, qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = host.root / "elsewhere"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with sampling(qwen3_folder, host.root, snapshot_memory_folder=elsewhere) as other:
        run = create(host.stub)
        prompt = (9, 8, 7, 6)
        for name in ("", "named", ""):
            step(run)
            path = publish(run, name)
            call = other.stub.Sample.future(
                sample_request(prompt, model_path=path), timeout=DEADLINE_S
            )
            here = host.sampler.sample(prompt, model_path=path)
            assert call.result().sequences == here.sequences  # bit by bit
            assert f"adapter fetched path={path}" in other.service.log_text()
    assert not elsewhere.exists()


def test_three_revisions_of_a_run_answer_at_once_each_with_its_own(host: Host) -> None:
    run = create(host.stub)
    paths = []
    for _ in range(3):
        step(run)
        paths.append(publish(run))
    alone = [host.sampler.sample(model_path=path) for path in paths]
    assert len({str(tokens_of(response)) for response in alone}) == 3
    calls = [
        host.sampler.stub.Sample.future(sample_request(model_path=path), timeout=DEADLINE_S)
        for path in paths * 5
    ]
    for i, call in enumerate(calls):
        assert call.result().sequences == alone[i % 3].sequences
        assert call.result().sequences[0].revision_path == paths[i % 3]


def test_a_run_continues_from_a_snapshot_in_memory(host: Host) -> None:
    run = create(host.stub)
    step(run)
    path = publish(run)
    other = create(host.stub)
    assert other.send(other.load_state(path)).revision_path == path
    assert publish(other) != path


def test_a_torn_row_is_refused_by_name_and_the_stored_one_is_sampled(host: Host) -> None:
    path = publish(create(host.stub))
    until(lambda: host.store.has(parse_path(path)))
    name = path.rpartition("/")[2]
    (row,) = host.root.glob(f"memory/*/*/{name}")
    row.write_bytes(row.read_bytes()[:-1])
    size_bytes = row.stat().st_size

    assert tokens_of(host.sampler.sample(model_path=path))

    log = host.sampler.service.log_text()
    assert f"`{name}` of checkpoint `{path}` has {size_bytes} bytes, not" in log
    assert f"adapter fetched path={path}" in log


def test_a_ttl_ends_the_copy_in_memory_and_the_stored_one_stays(host: Host) -> None:
    run = create(host.stub)
    request = run.save_for_sampler()
    request.ttl.FromMilliseconds(100)
    path = run.send(request).revision_path
    name = path.rpartition("/")[2]
    until(lambda: not list(host.root.glob(f"memory/*/*/{name}")))
    assert tokens_of(host.sampler.sample(model_path=path))
    assert f"adapter fetched path={path}" in host.sampler.service.log_text()


def test_a_deleted_run_takes_its_rows_with_it(host: Host) -> None:
    run = create(host.stub)
    path = publish(run)
    host.stub.DeleteTrainingRun(
        trainer_pb2.DeleteTrainingRunRequest(training_run_id=run.id, request_id="d"),
        timeout=DEADLINE_S,
    )
    assert not list(host.root.glob(f"memory/*/{run.id}/*"))
    code, _, info = refusal(lambda: host.sampler.sample(model_path=path))
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND")


def test_memory_is_bounded_and_nothing_is_lost_and_tenants_find_their_own_alone(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    keys = {tenant: make_key(tenant, tmp_path / "keys") for tenant in ("ada", "bob")}
    flags = {"keys": tmp_path / "keys"}
    with (
        training(qwen3_folder, tmp_path, snapshot_memory_mib=1, **flags) as trainer,
        sampling(qwen3_folder, tmp_path, keys["ada"], **flags) as ada,
        connected(ada.service, tmp_path / "store", keys["bob"]) as bob,
        grpc.insecure_channel(trainer.address) as channel,
    ):
        options = {"metadata": [("authorization", f"Bearer {keys['ada']}")]}
        run = create(trainer_pb2_grpc.TrainerServiceStub(channel), options)
        path = publish(run)
        for _ in range(2):  # before and after the sampler has it
            code, _, info = refusal(lambda: bob.sample(model_path=path))
            assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
            assert tokens_of(ada.sample(model_path=path))
        paths = []
        for _ in range(8):
            step(run)
            paths.append(publish(run))
            files = [f for f in tmp_path.glob("memory/**/*") if f.is_file()]
            assert sum(f.stat().st_size for f in files) <= 2**20
        tokens = [str(tokens_of(ada.sample(model_path=path))) for path in paths]
        assert len(set(tokens)) > 4
    assert not (tmp_path / "memory").exists()  # the trainer has ended
    assert all(CheckpointStore(tmp_path / "store").open(p, tenant="ada") for p in paths)


def test_the_next_trainer_stores_what_a_killed_one_left_in_memory(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/.staging").touch()  # the store fails
    memory = tmp_path / "memory"
    with running_summing_trainer(tmp_path, snapshot_memory_folder=memory) as trainer:
        with grpc.insecure_channel(trainer.address) as channel:
            run = create(trainer_pb2_grpc.TrainerServiceStub(channel))
            step(run)
            path = publish(run)
        engines = [engine.pid for engine in children(trainer.process.pid)]
        for pid in (trainer.process.pid, *engines):
            os.kill(pid, signal.SIGKILL)
        trainer.process.wait(DEADLINE_S)
    assert len(list(tmp_path.glob("memory/*/*/*"))) == 1
    (tmp_path / "store/.staging").unlink()

    with running_summing_trainer(tmp_path, snapshot_memory_folder=memory):
        until(lambda: CheckpointStore(tmp_path / "store").has(parse_path(path)))
        until(lambda: len(list(memory.glob("*"))) == 1)
    assert CheckpointStore(tmp_path / "store").open(path, tenant="default")
    assert not memory.exists()


def test_a_store_that_fails_is_said_of_the_run(tmp_path: Path) -> None:
    with (
        running_summing_trainer(tmp_path, snapshot_memory_folder=tmp_path / "memory") as trainer,
        grpc.insecure_channel(trainer.address) as channel,
    ):
        run = create(trainer_pb2_grpc.TrainerServiceStub(channel))
        assert publish(run, "first")  # which makes the folder
        (tmp_path / "store/.staging").rmdir()
        (tmp_path / "store/.staging").touch()
        path = publish(run)
        until(lambda: run.describe().state_message != "")
        assert path in run.describe().state_message
        assert "in memory alone" in trainer.log_text()
        (tmp_path / "store/.staging").unlink()
        publish(run)
        until(lambda: run.describe().state_message == "")
        assert CheckpointStore(tmp_path / "store").open(path, tenant="default")

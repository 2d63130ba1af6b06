"""The engine is killed: the front survives it, and has another do again what is gone.

It is one of sums without a model, which starts when a test wants it to; in tests/faults real ones
are killed.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mintrpc.v1 import model_pb2, model_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from tests.engines.rows import HELD
from tests.servers import RunningService, running_summing_trainer
from tests.trainer_rpc import CALL_LIMIT_S, RawRun, create, create_request, datum
from tests.warm import children


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("summing")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[RunningService]:
    with running_summing_trainer(folder) as running:
        yield running


@pytest.fixture
def channel(service: RunningService) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.address) as channel:
        yield channel


def kill_engine(service: RunningService, number: int = signal.SIGKILL) -> None:
    (engine,) = children(service.process.pid)
    os.kill(engine.pid, number)


@contextmanager
def no_engine(service: RunningService, folder: Path, channel: grpc.Channel) -> Iterator[None]:
    """Kills the engine and keeps the next from getting ready."""
    held = folder / "model" / HELD
    held.touch()
    try:
        kill_engine(service)
        await_health(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
        yield
    finally:
        held.unlink()


def await_health(channel: grpc.Channel, wanted: int) -> None:
    """Follows the health service until it says so."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="mintrpc.v1.TrainerService"), timeout=CALL_LIMIT_S
    )
    for answer in watch:
        if answer.status == wanted:
            watch.cancel()
            return


def test_callers_only_wait_while_a_killed_engine_is_replaced(
    service: RunningService, folder: Path, channel: grpc.Channel
) -> None:
    run = create(trainer_pb2_grpc.TrainerServiceStub(channel))
    other = create(run.stub)  # the same, and no engine dies under it
    first = run.forward_backward()
    answer = run.send(first)
    kill_engine(service, signal.SIGSTOP)
    under_way = run.start(run.forward_backward(*[datum([3, 4, 5])] * 3))
    queued = run.start(run.optim_step())
    run.wait_until_accepted(3)

    with no_engine(service, folder, channel):
        assert not ready(channel)
        assert run.send(first) == answer  # what was answered stays answered

    outcomes = [under_way.result(), queued.result()]
    await_health(channel, health_pb2.HealthCheckResponse.SERVING)
    assert ready(channel)
    described = run.describe()
    assert described.state == trainer_pb2.TrainingRun.STATE_ACTIVE
    assert (described.step, described.inexact_replay_count) == (1, 0)
    assert b"mint_engine_restarts 1.0" in metrics(service)
    assert b"mint_rows_restored_total 1.0" in metrics(service)
    requests = (other.forward_backward(), other.forward_backward(*[datum([3, 4, 5])] * 3))
    expected = [other.send(request) for request in (*requests, other.optim_step())]
    assert [answer, *outcomes] == expected


def ready(channel: grpc.Channel) -> bool:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    answer = stub.GetServerCapabilities(model_pb2.GetServerCapabilitiesRequest())
    assert len(answer.base_models) == 1  # also while the engine is away
    return bool(answer.engine_ready)


def metrics(service: RunningService) -> bytes:
    from urllib.request import urlopen

    with urlopen(f"http://{service.metrics_address}/metrics") as answer:
        return bytes(answer.read())


def test_runs_are_opened_changed_and_deleted_while_there_is_no_engine(
    service: RunningService, folder: Path, channel: grpc.Channel
) -> None:
    stub = trainer_pb2_grpc.TrainerServiceStub(channel)
    run = create(stub)
    with no_engine(service, folder, channel):
        named = {"training_run_id": run.id, "request_id": "while away"}
        opened = stub.OpenTrainingRun(trainer_pb2.OpenTrainingRunRequest(**named))
        named["request_id"] = "changed"
        stub.UpdateTrainingRun(trainer_pb2.UpdateTrainingRunRequest(**named, metadata={"a": "b"}))
        assert (opened.writer_epoch, opened.next_sequence) == (2, 1)
        assert dict(run.describe().metadata) == {"a": "b"}
        named["request_id"] = "deleted"
        stub.DeleteTrainingRun(trainer_pb2.DeleteTrainingRunRequest(**named))

        assert run.refused(run.discard()).reason == "TRAINING_RUN_NOT_FOUND"


def test_a_create_under_way_when_the_engine_dies_only_takes_longer(
    service: RunningService, channel: grpc.Channel
) -> None:
    stub = trainer_pb2_grpc.TrainerServiceStub(channel)
    create(stub)  # waits for the engine
    kill_engine(service, signal.SIGSTOP)
    request = create_request()
    under_way = stub.CreateTrainingRun.future(request, timeout=CALL_LIMIT_S)
    with pytest.raises(grpc.FutureTimeoutError):
        under_way.result(timeout=0.5)
    kill_engine(service)

    answer = under_way.result()

    assert stub.CreateTrainingRun(request, timeout=CALL_LIMIT_S) == answer
    run = RawRun(stub, answer.training_run, answer.writer_epoch)
    run.send(run.forward_backward())


def test_calls_in_flight_are_bounded(service: RunningService, channel: grpc.Channel) -> None:
    run = create(trainer_pb2_grpc.TrainerServiceStub(channel))
    kill_engine(service, signal.SIGSTOP)
    try:
        waiting = [run.start(run.forward_backward()) for _ in range(64)]
        while run.describe().next_sequence < 65:
            pass
        refused = run.refused(run.forward_backward())
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason == "TOO_MANY_CALLS_IN_FLIGHT"
        assert refused.retry_after_s == 1
        assert b"mint_queue_depth 64.0" in metrics(service)
    finally:
        kill_engine(service, signal.SIGCONT)
    for answer in waiting:
        answer.result()
    run.next_sequence = 65
    assert run.send(run.optim_step(backward_count=64)).step == 1

"""What surrounds every call, with a real server and a real channel."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from mint_core.access import KeyRing, make_key
from mint_core.errors import (
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    TrainingRunNotFound,
    Unavailable,
)
from mint_core.rpc.caller import caller, note
from mint_core.rpc.hosting import RpcServer
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.model_service import ModelServicer, Offer, add_model_service
from mintrpc.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)

LIMIT_S = 20.0
MAX_MESSAGE_BYTES = 1024 * 1024


@dataclass
class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Raises what it is given, or answers with the caller's tenant."""

    error: Exception | None = None
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    leave: asyncio.Event = field(default_factory=asyncio.Event)

    async def GetTrainingRun(self, request: Any, context: Any) -> Any:
        if self.error:
            raise self.error
        run = trainer_pb2.TrainingRun(training_run_id=caller().tenant)
        return trainer_pb2.GetTrainingRunResponse(training_run=run)

    async def OptimStep(self, request: Any, context: Any) -> Any:
        note(tokens=8, wait_s=0.5)
        return trainer_pb2.OptimStepResponse(step=request.sequence)

    async def ForwardBackward(self, request: Any, context: Any) -> Any:
        return trainer_pb2.ForwardBackwardResponse()

    async def WatchTrainingRun(self, request: Any, context: Any) -> AsyncIterator[Any]:
        run = trainer_pb2.TrainingRun(training_run_id=caller().tenant)
        yield trainer_pb2.WatchTrainingRunResponse(training_run=run)
        if self.error:
            raise self.error
        self.started.set()
        try:
            await self.leave.wait()
            raise Unavailable("the server is leaving")
        finally:
            self.cancelled.set()


class Checkpoints(checkpoint_pb2_grpc.CheckpointServiceServicer):
    async def UploadCheckpoint(self, requests: Any, context: Any) -> Any:
        size_bytes = 0
        async for request in requests:
            size_bytes += len(request.piece.data)
            if request.piece.file_name == "bad":
                raise InvalidRequest("`piece.file_name` is bad", field="piece.file_name")
        checkpoint = checkpoint_pb2.Checkpoint(path=caller().tenant, size_bytes=size_bytes)
        return checkpoint_pb2.UploadCheckpointResponse(checkpoint=checkpoint)


@dataclass
class Served:
    server: RpcServer
    port: int
    trainer: Trainer
    channel: grpc.aio.Channel
    metrics_address: str

    @property
    def stub(self) -> Any:
        return trainer_pb2_grpc.TrainerServiceStub(self.channel)

    @property
    def checkpoints(self) -> Any:
        return checkpoint_pb2_grpc.CheckpointServiceStub(self.channel)

    @property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)


@asynccontextmanager
async def serving(keys: KeyRing | None = None) -> AsyncIterator[Served]:
    metrics = Metrics()
    server = RpcServer(
        "127.0.0.1:0",
        role="trainer",
        keys=keys,
        max_message_bytes=MAX_MESSAGE_BYTES,
        metrics=metrics,
    )
    trainer = Trainer()
    server.add(
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
        trainer,
        "mintrpc.v1.TrainerService",
    )
    server.add(
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server,
        Checkpoints(),
        "mintrpc.v1.CheckpointService",
    )
    add_model_service(server, ModelServicer(lambda: None, lambda: False, Offer(role="trainer")))
    port = await server.start()
    metrics_address = f"127.0.0.1:{metrics.serve('127.0.0.1:0')}"
    async with (
        asyncio.timeout(LIMIT_S),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Served(server, port, trainer, channel, metrics_address)
    await server.stop(0)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as host:
        yield host


@pytest.fixture
def call_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="mint.calls"):
        yield caplog


def details(error: grpc.aio.AioRpcError, kind: Any) -> list[Any]:
    status = rpc_status.from_call(error)
    assert status is not None
    found = []
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            found.append(kind.FromString(packed.value))
    return found


def reason(error: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    (info,) = details(error, error_details_pb2.ErrorInfo)
    assert info.domain == "mint"
    return info.reason, dict(info.metadata)


RUN = trainer_pb2.GetTrainingRunRequest(training_run_id="r-1")


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_domain_error_arrives_with_its_reason_and_metadata(served: Served) -> None:
    served.trainer.error = TrainingRunNotFound("r-1")
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details() == "there is no training run `r-1`; list_training_runs names yours"
    assert reason(error) == ("TRAINING_RUN_NOT_FOUND", {"training_run_id": "r-1"})


async def test_a_bad_field_is_named(served: Served) -> None:
    served.trainer.error = InvalidRequest("`data` is empty; give a datum", field="data")
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    (bad,) = details(error, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("data", "`data` is empty; give a datum")
    ]


async def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    served.trainer.error = ResourceExhausted("the queue is full", retry_after_s=1.5)
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    (retry,) = details(error, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_a_bug_is_internal_and_only_the_log_has_it(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.trainer.error = KeyError("a secret")
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    kind, metadata = reason(error)
    assert kind == "INTERNAL"
    assert metadata["incident"] in str(error.details())
    assert f"incident={metadata['incident']}" in caplog.text
    assert "KeyError: 'a secret'" in caplog.text


@pytest.mark.parametrize("character", ["x", "\u4e16", "\n"])
async def test_a_long_error_is_cut_to_what_headers_hold(served: Served, character: str) -> None:
    long = character * 20_000
    served.trainer.error = NotFound(long, **{f"key{n}": long for n in range(20)})
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert str(error.details()).startswith(character * 50)
    assert str(error.details()).endswith(" ...")


async def test_an_unknown_field_is_refused_with_its_path(served: Served) -> None:
    newer = trainer_pb2.ForwardBackwardRequest(data=[{}, {"model_input": {"chunks": [{}]}}])
    newer.data[1].model_input.chunks[0].encoded_text.tokens.append(3)
    chunk = newer.data[1].model_input.chunks[0].encoded_text
    chunk.MergeFromString(b"\xa0\x06\x01")  # field number 100
    error = await refused(served.stub.ForwardBackward(newer))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "field number 100 in `data[1].model_input.chunks[0].encoded_text`" in str(
        error.details()
    )
    assert "client is newer" in str(error.details())


async def test_an_unknown_field_in_a_map_is_refused(served: Served) -> None:
    newer = trainer_pb2.ForwardBackwardRequest(data=[{}])
    newer.data[0].loss_fn_inputs["weights"].MergeFromString(b"\xa0\x06\x01")
    error = await refused(served.stub.ForwardBackward(newer))

    (bad,) = details(error, error_details_pb2.BadRequest)
    assert bad.field_violations[0].field == "data[0].loss_fn_inputs.weights"


async def test_an_unknown_field_at_the_top_is_refused(served: Served) -> None:
    newer = trainer_pb2.GetTrainingRunRequest.FromString(
        RUN.SerializeToString() + b"\xa2\x06\x02hi"
    )
    error = await refused(served.stub.GetTrainingRun(newer))

    assert "field number 100 in `the request`" in str(error.details())


async def test_bytes_that_are_no_message_are_refused(served: Served) -> None:
    call = served.channel.unary_unary("/mintrpc.v1.TrainerService/GetTrainingRun")
    error = await refused(call(b"\xff\xff\xff"))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not this RPC's message" in str(error.details())


async def test_an_unknown_rpc_is_unimplemented_and_says_so(served: Served) -> None:
    for call in (
        served.channel.unary_unary("/mintrpc.v1.TrainerService/Levitate"),
        served.channel.unary_unary("/mintrpc.v9.NoService/GetTrainingRun"),
    ):
        error = await refused(call(b""))

        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "no RPC `/mintrpc.v" in str(error.details())
        assert "version differs" in str(error.details())


async def test_a_method_without_a_body_is_unimplemented(served: Served) -> None:
    error = await refused(served.stub.SaveState(trainer_pb2.SaveStateRequest()))

    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert reason(error) == ("UNIMPLEMENTED", {"method": "SaveState"})
    stream = served.checkpoints.DownloadCheckpoint(checkpoint_pb2.DownloadCheckpointRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_streams_of_answers_pass_the_same_way(served: Served) -> None:
    served.trainer.error = TrainingRunNotFound("r-1")
    stream = served.stub.WatchTrainingRun(trainer_pb2.WatchTrainingRunRequest())
    first = await stream.read()
    assert first.training_run.training_run_id == "default"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()

    assert reason(caught.value)[0] == "TRAINING_RUN_NOT_FOUND"


async def test_leaving_a_stream_ends_its_work_at_once(
    served: Served, call_log: pytest.LogCaptureFixture
) -> None:
    stream = served.stub.WatchTrainingRun(trainer_pb2.WatchTrainingRunRequest())
    await stream.read()
    await served.trainer.started.wait()
    stream.cancel()
    await served.trainer.cancelled.wait()


async def test_streams_of_requests_pass_the_same_way(served: Served) -> None:
    pieces = [checkpoint_pb2.UploadCheckpointRequest(piece={"data": b"12345"}) for _ in range(3)]
    answer = await served.checkpoints.UploadCheckpoint(iter(pieces))
    assert answer.checkpoint.size_bytes == 15
    assert answer.checkpoint.path == "default"

    pieces[1].piece.file_name = "bad"
    error = await refused(served.checkpoints.UploadCheckpoint(iter(pieces)))
    assert reason(error) == ("INVALID_REQUEST", {"field": "piece.file_name"})

    pieces[0].piece.MergeFromString(b"\xa0\x06\x01")
    error = await refused(served.checkpoints.UploadCheckpoint(iter(pieces)))
    assert "field number 100 in `piece`" in str(error.details())


async def test_an_oversize_message_is_refused_by_grpc_itself(served: Served) -> None:
    tokens = b"\0" * (MAX_MESSAGE_BYTES + 1)
    big = trainer_pb2.ForwardBackwardRequest(data=[{"loss_fn_inputs": {"w": {"values": tokens}}}])
    error = await refused(served.stub.ForwardBackward(big))

    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rpc_status.from_call(error) is None


async def test_without_keys_everybody_is_default(served: Served) -> None:
    answer = await served.stub.GetTrainingRun(RUN, metadata=[("x-api-key", "whatever")])

    assert answer.training_run.training_run_id == "default"


async def test_keys_decide_the_tenant(tmp_path: Path) -> None:
    alice, bob = make_key("alice", tmp_path / "keys"), make_key("bob", tmp_path / "keys")
    async with serving(KeyRing(tmp_path / "keys")) as served:
        for metadata, tenant in (
            ([("authorization", f"Bearer {alice}")], "alice"),
            ([("authorization", f"bearer {bob}")], "bob"),
            ([("x-api-key", bob)], "bob"),
        ):
            answer = await served.stub.GetTrainingRun(RUN, metadata=metadata)
            assert answer.training_run.training_run_id == tenant
            stream = served.stub.WatchTrainingRun(
                trainer_pb2.WatchTrainingRunRequest(), metadata=metadata
            )
            assert (await stream.read()).training_run.training_run_id == tenant
            stream.cancel()


async def test_a_missing_or_wrong_key_is_unauthenticated(
    tmp_path: Path, call_log: pytest.LogCaptureFixture
) -> None:
    make_key("alice", tmp_path / "keys")
    async with serving(KeyRing(tmp_path / "keys")) as served:
        missing = await refused(served.stub.GetTrainingRun(RUN))
        wrong = await refused(
            served.stub.GetTrainingRun(RUN, metadata=[("authorization", "Bearer sk-mint-wrong")])
        )
        uploading = await refused(served.checkpoints.UploadCheckpoint(iter([])))
        unknown = await refused(served.channel.unary_unary("/mintrpc.v1.X/Y")(b""))
        health = await served.health.Check(health_pb2.HealthCheckRequest())

    for error in (missing, wrong, uploading, unknown):
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        assert reason(error) == ("UNAUTHENTICATED", {})
    assert "carries no API key" in str(missing.details())
    assert "not known" in str(wrong.details())
    assert "sk-mint-wrong" not in call_log.text + str(wrong.details())
    assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_call_leaves_one_line(served: Served, call_log: pytest.LogCaptureFixture) -> None:
    await served.stub.OptimStep(trainer_pb2.OptimStepRequest(training_run_id="r-7", sequence=3))
    served.trainer.error = TrainingRunNotFound("r-1\nfake line")
    await refused(
        served.stub.GetTrainingRun(
            trainer_pb2.GetTrainingRunRequest(training_run_id="r-1\nfake line")
        )
    )
    await served.health.Check(health_pb2.HealthCheckRequest())

    step, get = (record.getMessage() for record in call_log.records if record.name == "mint.calls")
    assert step.startswith(
        "method=OptimStep tenant=default code=OK run=r-7 sequence=3 tokens=8 wait_s=0.5000 s=0."
    )
    assert get.startswith(
        "method=GetTrainingRun tenant=default code=NOT_FOUND reason=TRAINING_RUN_NOT_FOUND"
        " run='r-1\\nfake line' s=0."
    )


async def test_calls_are_counted_by_method_and_code(served: Served) -> None:
    await served.stub.OptimStep(trainer_pb2.OptimStepRequest())
    await served.stub.OptimStep(trainer_pb2.OptimStepRequest())
    served.trainer.error = TrainingRunNotFound("r-1")
    await refused(served.stub.GetTrainingRun(RUN))
    await refused(served.channel.unary_unary("/mintrpc.v1.TrainerService/Levitate")(b""))
    page = await scrape(served.metrics_address)

    assert 'mint_calls_total{code="OK",method="OptimStep"} 2.0' in page
    assert 'mint_calls_total{code="NOT_FOUND",method="GetTrainingRun"} 1.0' in page
    assert 'mint_calls_total{code="UNIMPLEMENTED",method="unknown"} 1.0' in page
    assert 'mint_call_seconds_count{method="OptimStep"} 2.0' in page
    assert "mint_front_process_resident_memory_bytes" in page


async def scrape(address: str) -> str:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return page


async def test_health_follows_the_server_and_each_service(served: Served) -> None:
    Status = health_pb2.HealthCheckResponse
    for serving_now, status in (
        (None, Status.NOT_SERVING),
        (True, Status.SERVING),
        (False, Status.NOT_SERVING),
    ):
        if serving_now is not None:
            await served.server.set_serving(serving_now)
        for name in ("", "mintrpc.v1.TrainerService", "mintrpc.v1.ModelService"):
            answer = await served.health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == status


async def test_reflection_lists_the_services(served: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]

    names = {service.name for service in answers[0].list_services_response.service}
    assert {
        "mintrpc.v1.TrainerService",
        "mintrpc.v1.ModelService",
        "grpc.health.v1.Health",
    } <= names


async def test_a_port_in_use_is_refused(served: Served) -> None:
    address = f"127.0.0.1:{served.port}"
    second = RpcServer(
        address, role="sampler", keys=None, max_message_bytes=MAX_MESSAGE_BYTES, metrics=Metrics()
    )
    with pytest.raises(FailedPrecondition, match=f"`address` {address} .*port is in use"):
        await second.start()
    with pytest.raises(FailedPrecondition, match=r"`metrics_address` .* in use"):
        Metrics().serve(served.metrics_address)


async def test_stopping_ends_streams_that_have_no_end(served: Served) -> None:
    served.server.before_stop(served.trainer.leave.set)
    stream = served.stub.WatchTrainingRun(trainer_pb2.WatchTrainingRunRequest())
    await stream.read()
    await served.trainer.started.wait()

    await served.server.stop(LIMIT_S)  # which the stream does not use up

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "leaving" in str(caught.value.details())


async def test_stopping_lets_calls_end(served: Served) -> None:
    stream = served.stub.WatchTrainingRun(trainer_pb2.WatchTrainingRunRequest())
    await stream.read()
    await served.server.stop(0.05)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()

    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_a_call_may_wait_long_while_its_client_asks_for_signs_of_life(
    served: Served,
) -> None:
    options = [("grpc.keepalive_time_ms", 1000), ("grpc.http2.max_pings_without_data", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options) as channel:
        stub: Any = trainer_pb2_grpc.TrainerServiceStub(channel)
        stream = stub.WatchTrainingRun(trainer_pb2.WatchTrainingRunRequest())
        await stream.read()
        with pytest.raises(TimeoutError):  # and no GOAWAY for too many pings
            await asyncio.wait_for(stream.read(), 5.0)

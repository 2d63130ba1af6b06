"""What surrounds every call, with a real server and a real channel."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from mint_core.access.door import Door
from mint_core.access.key_ring import KeyRing
from mint_core.errors import (
    FailedPrecondition,
    TrainingRunNotFound,
)
from mint_core.rpc import interceptors
from mint_core.rpc.hosting import RpcServer
from mint_core.rpc.metrics import Metrics
from mintrpc.v1 import (
    trainer_pb2,
    trainer_pb2_grpc,
)
from tests.busy_threads import no_thread_free
from tests.hosted import LIMIT_S, RUN, Served, details, reason, refused, serving
from tests.keys import make_key


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


async def test_so_many_connections_are_taken_in_and_those_that_are_there_go_on() -> None:
    async with serving(max_connections=3) as served:
        await served.stub.GetTrainingRun(RUN)
        others = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(20)]
        ended = 0
        for reader, _ in others:
            with suppress(ConnectionError):
                while data := await asyncio.wait_for(reader.read(1024), LIMIT_S):
                    if data:
                        break
            ended += reader.at_eof() or not data
        assert ended == 18
        await served.stub.GetTrainingRun(RUN)
        for _, writer in others:
            writer.close()


async def test_a_key_is_looked_at_before_the_body_comes(tmp_path: Path) -> None:
    """A caller without one is answered though it has sent nothing but headers."""
    make_key("alice", tmp_path / "keys")
    coming = asyncio.get_running_loop().create_future()

    async def body() -> AsyncIterator[bytes]:
        yield await coming

    async with serving(KeyRing(tmp_path / "keys")) as served:
        for method in ("TrainerService/ForwardBackward", "CheckpointService/UploadCheckpoint"):
            call = served.channel.stream_unary(f"/mintrpc.v1.{method}")
            error = await refused(call(body(), metadata=[("x-api-key", "sk-mint-wrong")]))
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED


LARGE = trainer_pb2.ForwardBackwardRequest(training_run_id="r", data=[{}] * 1000)
LARGE.data[0].loss_fn_inputs["weights"].values = b"\0" * 100_000


async def test_what_is_large_is_parsed_by_threads_of_its_own(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the event loop nor where others wait for disks and stores."""
    real, names = interceptors.parse, list[str]()

    def watched(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr(interceptors, "parse", watched)
    async with no_thread_free():
        await served.stub.ForwardBackward(LARGE)
        await served.stub.OptimStep(trainer_pb2.OptimStepRequest())

    assert names[0].startswith("parsing")
    assert names[1] == threading.current_thread().name


async def test_a_tenant_has_so_many_calls_streams_and_bytes_under_way(tmp_path: Path) -> None:
    quotas = tmp_path / "quotas"
    watch = trainer_pb2.WatchTrainingRunRequest(training_run_id="r")
    for quota, of_one, beyond in (
        ("calls = 1", "calls", lambda served: served.stub.GetTrainingRun(RUN)),
        ("streams = 1", "streams", lambda served: served.checkpoints.UploadCheckpoint(iter([]))),
        ("request_mib = 0", "request_mib", lambda served: served.stub.ForwardBackward(LARGE)),
    ):
        quotas.write_text(quota)
        async with serving(quotas=quotas) as served:
            served.server.begin()  # before it, what cannot be held is to come again
            stream = served.stub.WatchTrainingRun(watch)
            await stream.read()
            error = await refused(beyond(served))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert reason(error)[1]["quota"] == of_one
            assert details(error, error_details_pb2.RetryInfo)
            stream.cancel()
            while not served.trainer.cancelled.is_set():
                await asyncio.sleep(0.001)
            await beyond(served)


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


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
async def test_reflection_lists_the_services(served: Served, version: str) -> None:
    ask = served.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in ask(iter([request]))]

    names = {service.name for service in answers[0].list_services_response.service}
    assert {
        "mintrpc.v1.TrainerService",
        "mintrpc.v1.ModelService",
        "grpc.health.v1.Health",
    } <= names


async def test_a_port_in_use_is_refused(served: Served) -> None:
    address = f"127.0.0.1:{served.port}"
    second = RpcServer(address, door=Door(None), metrics=Metrics())
    with pytest.raises(FailedPrecondition, match=f"`address` {address} .*port is in use"):
        await second.start()
    with pytest.raises(FailedPrecondition, match=r"`metrics_address` .* in use"):
        Metrics().serve(served.metrics_address)


async def test_stopping_ends_streams_that_have_no_end(served: Served) -> None:
    async def end_streams() -> None:
        served.trainer.leave.set()

    served.server.drain_by(end_streams)
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


async def test_a_burst_of_calls_waits_while_the_loop_is_busy(served: Served) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        # Sent without leaving the loop free: more than gRPC keeps by default.
        calls = [stub.GetTrainingRun.future(RUN) for _ in range(4000)]
        answers = await asyncio.to_thread(lambda: [call.result(LIMIT_S) for call in calls])
    assert {answer.training_run.training_run_id for answer in answers} == {"default"}

"""The shipped service config, obeyed by a channel of gRPC's own, without code of a client."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from mint_core.errors import MintError, ModelLoading, NotFound, ResourceExhausted, Unavailable
from mint_core.rpc.errors import Recorded, recorded, to_status
from mintrpc.v1 import trainer_pb2_grpc
from tests.hosted import LIMIT_S, RUN, Served, details, reason, refused, serving

CONFIG = Path(__file__).parents[2] / "proto/service_config.json"
FULL = ResourceExhausted("the queue is full", retry_after_s=0.01)


@asynccontextmanager
async def plain_stub(port: int) -> AsyncIterator[trainer_pb2_grpc.TrainerServiceStub]:
    options = [("grpc.service_config", CONFIG.read_text())]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        yield trainer_pb2_grpc.TrainerServiceStub(channel)


async def test_what_may_work_later_is_sent_again(served: Served) -> None:
    served.trainer.first_errors = [FULL, Unavailable("starting"), FULL]
    async with plain_stub(served.port) as stub:
        await stub.GetTrainingRun(RUN, timeout=LIMIT_S)
    assert served.trainer.asked == 4


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhausted("no room, and none to come"),
        NotFound("nothing"),
        Recorded(recorded(to_status(ResourceExhausted("the store is full")), 3)),
    ],
)
async def test_what_is_final_is_not(served: Served, error: MintError) -> None:
    served.trainer.first_errors = [error]
    async with plain_stub(served.port) as stub:
        told = await refused(stub.GetTrainingRun(RUN, timeout=LIMIT_S))
    assert dict(told.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
    assert served.trainer.asked == 1


async def test_the_hint_is_that_of_retry_info(served: Served) -> None:
    served.trainer.error = ResourceExhausted("the queue is full", retry_after_s=1.25)
    told = await refused(served.stub.GetTrainingRun(RUN))
    assert dict(told.trailing_metadata())["grpc-retry-pushback-ms"] == "1250"


async def test_a_server_that_is_not_there_yet_is_waited_for(served: Served) -> None:
    await served.server.stop(0)
    async with plain_stub(served.port) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetTrainingRun(RUN, timeout=0.3)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_call_is_held_while_the_model_is_loaded(served: Served) -> None:
    served.trainer.first_errors = [ModelLoading()]
    call = asyncio.ensure_future(served.stub.GetTrainingRun(RUN, timeout=LIMIT_S))
    while served.trainer.asked == 0:
        await asyncio.sleep(0.01)
    assert not call.done()
    served.server.begin()
    await call
    assert served.trainer.asked == 2


async def test_what_is_held_weighs_and_no_more_is_held_than_a_quota_allows(tmp_path: Path) -> None:
    quotas = tmp_path / "quotas.toml"
    quotas.write_text("request_mib = 0")  # whatever is the only one is taken
    async with serving(quotas=quotas) as served:
        served.trainer.first_errors = [ModelLoading()]
        call = asyncio.ensure_future(served.stub.GetTrainingRun(RUN, timeout=LIMIT_S))
        while served.trainer.asked == 0:
            await asyncio.sleep(0.01)
        told = await refused(served.stub.GetTrainingRun(RUN, timeout=LIMIT_S))
        assert (told.code(), reason(told)[0]) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
        assert details(told, error_details_pb2.RetryInfo)
        served.server.begin()
        await call
        await served.stub.GetTrainingRun(RUN, timeout=LIMIT_S)


async def test_a_call_that_was_held_is_sent_away_when_the_server_stops(served: Served) -> None:
    served.trainer.error = ModelLoading()
    call = asyncio.ensure_future(served.stub.GetTrainingRun(RUN, timeout=LIMIT_S))
    while served.trainer.asked == 0:
        await asyncio.sleep(0.01)
    stopping = asyncio.ensure_future(served.server.stop(LIMIT_S))
    told = await refused(call)
    assert told.code() == grpc.StatusCode.UNAVAILABLE
    assert dict(told.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    await stopping

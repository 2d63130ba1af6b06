"""A real server of the contract's services that answer without an engine."""

import asyncio
import functools
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_status import rpc_status

from mint_core.access.door import Door
from mint_core.access.key_ring import KeyRing
from mint_core.access.scopes import TenantBy
from mint_core.access.tls import Tls
from mint_core.engine_host import child_process
from mint_core.errors import InvalidRequest, Unavailable
from mint_core.rpc.caller import caller, note
from mint_core.rpc.hosting import RpcServer
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.model_service import ModelServicer, add_model_service
from mint_core.rpc.quotas import QuotaBook
from mintrpc.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    model_pb2,
    trainer_pb2,
    trainer_pb2_grpc,
)
from tests import warm
from tests.unit.trainer_service.models import MODEL

LIMIT_S = 20.0
MAX_MESSAGE_BYTES = 1024 * 1024


@dataclass
class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Raises what it is given, or answers with the caller's tenant."""

    error: Exception | None = None
    first_errors: list[Exception] = field(default_factory=list)  # of one call each
    asked: int = 0  # calls of GetTrainingRun
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    leave: asyncio.Event = field(default_factory=asyncio.Event)

    async def GetTrainingRun(self, request: Any, context: Any) -> Any:
        self.asked += 1
        if self.first_errors:
            raise self.first_errors.pop(0)
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
async def serving(
    keys: KeyRing | None = None,
    tls: Tls | None = None,
    *,
    quotas: Path | None = None,
    tenant_by: TenantBy = "auto",
    max_connections: int | None = None,
) -> AsyncIterator[Served]:
    metrics = Metrics()
    server = RpcServer(
        "127.0.0.1:0",
        door=Door(keys, tls, tenant_by),
        tls=tls,
        metrics=metrics,
        quotas=QuotaBook(quotas, metrics),
        max_message_bytes=MAX_MESSAGE_BYTES,
        max_connections=max_connections,
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
    offer = model_pb2.GetServerCapabilitiesResponse(role=model_pb2.SERVICE_ROLE_TRAINER)
    add_model_service(server, ModelServicer(lambda: None, lambda: False, offer))
    port = await server.start()
    metrics_address = f"127.0.0.1:{metrics.serve('127.0.0.1:0')}"
    async with (
        asyncio.timeout(LIMIT_S),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Served(server, port, trainer, channel, metrics_address)
    await server.stop(0)


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


@contextmanager
def serving_texts(folder: Path) -> Iterator[str]:
    """The address of a server, in a thread of its own, that has nothing of a model but its
    tokenizer.
    """
    started: Future[tuple[str, Callable[[], object]]] = Future()
    model = replace(MODEL, folder=str(folder), vocabulary_size=1000)

    async def serve() -> None:
        leave, loop = asyncio.Event(), asyncio.get_running_loop()
        server = RpcServer("127.0.0.1:0", door=Door(None), metrics=Metrics())
        offer = model_pb2.GetServerCapabilitiesResponse(
            role=model_pb2.SERVICE_ROLE_SAMPLER, features=["texts"]
        )
        add_model_service(server, ModelServicer(lambda: model, lambda: True, offer))
        port = await server.start()
        started.set_result((f"127.0.0.1:{port}", lambda: loop.call_soon_threadsafe(leave.set)))
        await leave.wait()
        await server.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    with pytest.MonkeyPatch.context() as patch:
        start = functools.partial(warm.started, env=warm.environment())
        own = SimpleNamespace(**{**vars(subprocess), "Popen": start})
        patch.setattr(child_process, "subprocess", own)  # of the process that has the tokenizer
        thread.start()
        address, leave = started.result(LIMIT_S)
        try:
            yield address
        finally:
            leave()
            thread.join()

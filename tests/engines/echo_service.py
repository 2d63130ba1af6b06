"""A service on the echo engine: `python -m tests.engines.echo_service --base-model FOLDER`."""

import sys
from dataclasses import dataclass

from mint_core.engine_host.pipe import ModelDescription
from mint_core.engine_host.process import EngineProcess
from mint_core.hosting.service_config import ServiceConfig, option
from mint_core.hosting.service_main import run_service
from mint_core.hosting.tasks import Tasks
from mint_core.rpc.hosting import RpcServer
from mint_core.rpc.model_service import ModelServicer, add_model_service
from mintrpc.v1 import model_pb2
from tests.engines.echo_jobs import EchoConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoServiceConfig(ServiceConfig):
    refusal: str = option("", "why the engine does not start")
    start_s: float = option(0.0, "how long the engine takes to start, in seconds")
    task_error: str = option("", "what a background task ends by, once the engine is up")


class EchoService:
    def __init__(self, config: EchoServiceConfig) -> None:
        engine = EchoConfig(config.base_model, config.refusal, start_s=config.start_s)
        self.engine = EngineProcess("tests.engines.echo", engine)
        self.tasks = Tasks()
        self._task_error = config.task_error
        self._model: ModelDescription | None = None

    def add_to(self, server: RpcServer) -> None:
        offer = model_pb2.GetServerCapabilitiesResponse(role=model_pb2.SERVICE_ROLE_TRAINER)
        servicer = ModelServicer(lambda: self._model, lambda: self.engine.ready, offer)
        add_model_service(server, servicer)

    async def start(self) -> None:
        self._model = (await self.engine.start()).model
        if self._task_error:
            self.tasks.start(self._fail(), "doomed")

    async def _fail(self) -> None:
        raise RuntimeError(self._task_error)

    async def stop(self) -> None:
        await self.engine.close()


def main() -> int:
    return run_service("trainer", EchoServiceConfig, lambda config, *_: EchoService(config))


if __name__ == "__main__":
    sys.exit(main())

"""The trainer's front with a real engine process that has no model."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mint_core.access.door import Door
from mint_core.lora.spec import LoraRequest
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import QuotaBook
from mintrpc.v1 import trainer_pb2
from tests.unit.trainer_service.calls import call, compute
from trainer_service.calls import Call, Step
from trainer_service.config import TrainerConfig
from trainer_service.jobs import AdamParams
from trainer_service.queue.scheduler import Scheduler
from trainer_service.run.run import Run
from trainer_service.runs import Runs
from trainer_service.service import TrainerService
from trainer_service.wire.requests import CreateRun, DeleteRun, Identity

LIMIT_S = 30.0
TENANT = "default"


@dataclass
class SetClock:
    """What retention times go by: it stands until it is set."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Front:
    """Runs of one tenant, made by number."""

    service: TrainerService
    state: Path
    clock: SetClock
    _ids: Iterator[int] = field(default_factory=itertools.count)

    @property
    def runs(self) -> Runs:
        return self.service.runs

    @property
    def scheduler(self) -> Scheduler:
        """Of the first group."""
        return self.service.groups.first.scheduler

    def run(self, name: str) -> Run:
        return self.runs.find(TENANT, name)

    def identity(self) -> Identity:
        return Identity(f"{self.state} {next(self._ids)}", b"")

    async def create(self, retention_s: float | None = None) -> str:
        request = CreateRun(
            identity=self.identity(),
            source=LoraRequest(rank=1),
            metadata={},
            isolated=False,
            retention_s=retention_s,
        )
        answer = await self.runs.create(TENANT, request)
        made = trainer_pb2.CreateTrainingRunResponse.FromString(answer)
        return made.training_run.training_run_id

    async def delete(self, run: str, identity: Identity | None = None) -> None:
        request = DeleteRun(
            training_run_id=run, identity=identity or self.identity(), delete_checkpoints=False
        )
        await self.runs.delete(TENANT, request)

    def submit(self, made: Call) -> asyncio.Task[Any]:
        """Brings a call to its run; what the task returns is the response message."""
        return asyncio.create_task(self._submit(made))

    async def _submit(self, made: Call) -> Any:
        kind: Any = getattr(trainer_pb2, f"{made.method}Response")
        return kind.FromString(await self.runs.submit(TENANT, made))


def backward(run: str, sequence: int, lengths: Sequence[int]) -> Call:
    return call(sequence, run=run, work=compute(*lengths))


def optim_step(run: str, sequence: int) -> Call:
    work = Step(adam_params=AdamParams(), backward_count=None)
    return call(sequence, run=run, method="OptimStep", work=work)


@asynccontextmanager
async def fronting(
    store: Path,
    retention_s: float = 1e9,
    engine_module: str = "tests.engines.trainer",
    snapshot_s: float = 60.0,
    quotas: Path | None = None,
    **options: Any,
) -> AsyncIterator[Front]:
    clock = SetClock()
    config = TrainerConfig(
        base_model=str(store),
        store=str(store),
        snapshot_s=snapshot_s,
        retention_days=retention_s / 86_400,
        **options,
    )
    metrics = Metrics()
    book = QuotaBook(quotas, metrics)
    service = TrainerService(config, metrics, Door(None), book, engine_module, clock)
    async with asyncio.timeout(LIMIT_S):
        await service.start()
        try:
            yield Front(service, store / ".state", clock)
        finally:
            await service.stop()

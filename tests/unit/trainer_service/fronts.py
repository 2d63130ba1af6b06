"""The trainer's front with a real engine process that has no model."""

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint_store import CheckpointStore
from mint_core.backlog import Load
from mint_core.engine_host.process import EngineProcess
from mint_core.lora.spec import LoraRequest
from mint_core.rpc.metrics import Metrics
from tests.unit.trainer_service.calls import call, compute
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.jobs import AdamParams
from trainer_service.queue.backlog import Backlogs
from trainer_service.queue.scheduler import Scheduler
from trainer_service.queue.usage import Usage
from trainer_service.recovery.durability import Durability
from trainer_service.run.call_numbers import SequenceLimits
from trainer_service.run.calls import Call, Outcome, Step
from trainer_service.runs import Runs
from trainer_service.wire.requests import CreateRun, DeleteRun, Identity

LIMIT_S = 30.0
TENANT = "ann"


@dataclass
class SetClock:
    """What retention times go by: it stands until it is set."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Front:
    """Runs of one tenant, made by number."""

    runs: Runs
    engine: EngineProcess
    metrics: Metrics
    state: Path
    clock: SetClock
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def identity(self) -> Identity:
        return Identity(str(next(self._ids)), b"")

    async def create(self, retention_s: float | None = None) -> str:
        request = CreateRun(
            identity=self.identity(),
            source=LoraRequest(rank=1),
            metadata={},
            isolated=False,
            retention_s=retention_s,
        )
        return (await self.runs.create(TENANT, request)).origin.training_run_id

    async def delete(self, run: str) -> None:
        request = DeleteRun(training_run_id=run, identity=self.identity(), delete_checkpoints=False)
        await self.runs.delete(TENANT, request)

    def submit(self, made: Call) -> asyncio.Task[Outcome]:
        return asyncio.create_task(self.runs.submit(TENANT, made))


def backward(run: str, sequence: int, lengths: Sequence[int]) -> Call:
    return call(sequence, run=run, work=compute(*lengths))


def optim_step(run: str, sequence: int) -> Call:
    work = Step(adam_params=AdamParams(), backward_count=None)
    return call(sequence, run=run, method="OptimStep", work=work)


@asynccontextmanager
async def fronting(
    store: Path,
    retention_s: float = math.inf,
    engine_module: str = "tests.engines.trainer",
    snapshot_s: float = 60.0,
) -> AsyncIterator[Front]:
    engine = EngineProcess(engine_module, "no settings", on_death=lambda why: scheduler.lose(why))
    metrics, clock = Metrics(), SetClock()
    scheduler = Scheduler(engine, Usage(metrics), lambda tenant: 1.0)
    durability = Durability(store / ".state", scheduler, metrics, snapshot_s=snapshot_s)
    limits = Load(count=1000, tokens=1_000_000)
    backlogs = Backlogs(limits, per_run=False, predict=scheduler.predict_s)
    runs = Runs(
        scheduler,
        Checkpoints(CheckpointStore(store)),
        metrics,
        SequenceLimits(),
        backlogs,
        durability,
        retention_s=retention_s,
        clock=clock,
    )
    front = Front(runs, engine, metrics, store / ".state", clock)

    async with asyncio.timeout(LIMIT_S):
        scheduler.welcome(await engine.start())
        durability.start(runs.all)
        runs.resume()
        try:
            yield front
        finally:
            await runs.stop()
            await durability.stop()
            await engine.close()

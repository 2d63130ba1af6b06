"""Runs that nobody calls are deleted, and only those. The clock is the test's."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from checkpoint_store import CheckpointStore
from mint_core.engine_process import EngineProcess
from mint_core.errors import NotFound
from mint_core.lora.spec import LoraRequest
from mint_core.rpc.metrics import Metrics
from tests.unit.trainer_service.calls import call, compute
from trainer_service.calls import Computed
from trainer_service.checkpoints import Checkpoints
from trainer_service.errors import TrainingRunExpired
from trainer_service.requests import CreateRun, Identity, OpenRun
from trainer_service.runs import Runs
from trainer_service.scheduler import Scheduler
from trainer_service.sequencing import SequenceLimits

LIMIT_S = 100.0
TENANT = "ann"


class Front:
    """The trainer's front with an engine process that has no model."""

    def __init__(self, store: Path) -> None:
        self.now_s = 0.0
        self.engine = EngineProcess("tests.engines.trainer", "no settings")
        self.metrics = Metrics()
        self.scheduler = Scheduler(self.engine, self.metrics)
        self.runs = Runs(
            self.scheduler,
            Checkpoints(CheckpointStore(store)),
            self.metrics,
            SequenceLimits(),
            retention_s=LIMIT_S,
            clock=lambda: self.now_s,
        )
        self._ids = map(str, itertools.count())

    def identity(self) -> Identity:
        return Identity(next(self._ids), b"")

    async def create(self, retention_s: float | None = None) -> str:
        request = CreateRun(
            identity=self.identity(),
            source=LoraRequest(rank=1),
            metadata={},
            retention_s=retention_s,
        )
        return (await self.runs.create(TENANT, request)).origin.training_run_id

    async def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        await self.runs.expire()

    def expired(self, run: str, tenant: str = TENANT) -> bool:
        """Whether the run is gone; asking counts as a call."""
        try:
            self.runs.get(tenant, run)
        except NotFound as error:
            return isinstance(error, TrainingRunExpired)
        return False


@asynccontextmanager
async def fronting(store: Path) -> AsyncIterator[Front]:
    front = Front(store)
    async with asyncio.timeout(30):
        front.scheduler.welcome(await front.engine.start())
        try:
            yield front
        finally:
            await front.runs.stop()
            await front.engine.close()


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with fronting(tmp_path) as made:
        yield made


async def test_a_run_that_nobody_calls_is_deleted_and_says_why(front: Front) -> None:
    run, hasty, patient = await front.create(), await front.create(10.0), await front.create(1e6)

    await front.pass_time(LIMIT_S + 1)

    assert front.expired(run)
    assert front.expired(hasty)
    assert not front.expired(patient)
    with pytest.raises(TrainingRunExpired, match="retention time of 10 s") as caught:
        front.runs.get(TENANT, hasty)
    assert caught.value.reason == "TRAINING_RUN_NOT_FOUND"
    with pytest.raises(NotFound) as other:
        front.runs.get("bob", hasty)
    assert not isinstance(other.value, TrainingRunExpired)
    registry = front.metrics._registry
    assert registry.get_sample_value("mint_training_runs_expired_total") == 2


async def test_every_call_starts_the_time_again(front: Front) -> None:
    by_get, by_open, by_call, idle = [await front.create() for _ in range(4)]

    for sequence in (1, 2, 3):
        await front.pass_time(0.4 * LIMIT_S)
        front.runs.get(TENANT, by_get)
        await front.runs.open(TENANT, OpenRun(by_open, front.identity()))
        made = call(sequence, run=by_call, work=compute(4, backward=False), method="Forward")
        await front.runs.submit(TENANT, made)

    assert not any(front.expired(run) for run in (by_get, by_open, by_call))
    assert front.expired(idle)


async def test_a_call_that_takes_longer_than_the_retention_time_is_finished(front: Front) -> None:
    run, other = await front.create(), await front.create()
    long = asyncio.create_task(front.runs.submit(TENANT, call(1, run=run, work=compute(4))))
    await asyncio.sleep(0)  # it is accepted, and not yet with the engine

    await front.pass_time(LIMIT_S + 1)

    assert isinstance(await long, Computed)
    assert not front.expired(run)
    assert front.expired(other)

"""Requests find a replica that is up, whatever becomes of another. The engines have no model."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointStore
from mint_core.backlog import Load
from mint_core.engine_host import process as engine_process
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, Unavailable
from mint_core.hosting.tasks import Tasks
from mint_core.rpc.caller import CALLER, Caller
from mint_core.rpc.metrics import Metrics
from sampler_service.adapters.leases import AdapterLeases
from sampler_service.adapters.revisions import Revisions
from sampler_service.adapters.row_folder import RowFolder
from sampler_service.execution import Execution
from sampler_service.jobs import BASE_MODEL, Choice, Generate, Sampling
from sampler_service.replicas.replica import Replica
from sampler_service.replicas.replicas import Replicas
from sampler_service.waiting_room import WaitingRoom
from tests.checkpoint_files import publish_as
from tests.engines.sampler_jobs import Die
from tests.unit.checkpoint_store.conftest import adapter
from tests.unit.checkpoint_store.rows import snapshot

LIMIT_S = 60.0
RANKS = 800


@dataclass
class Stage:
    replicas: Replicas
    execution: Execution
    revisions: Revisions
    store: CheckpointStore
    names: "itertools.count[int]" = field(default_factory=itertools.count)

    def publish(self) -> str:
        manifest = snapshot(name=f"a{next(self.names)}", tenant="t")
        return str(publish_as(self.store, manifest, adapter()["weights"]).revision_path)

    async def sample(self, path: str = BASE_MODEL) -> str:
        sampling = Sampling(model_path=path, prompt=np.arange(40), choice=Choice(seed=0))
        _, revision = await self.execution.sample(sampling)
        return revision

    async def keep(self, stack: AsyncExitStack, path: str) -> Replica:
        """Uses an adapter at the replica that is chosen, until the stack is left."""
        revision = await self.revisions.resolve(path, "t")
        sampling = Sampling(model_path=path, prompt=np.arange(40), choice=Choice(seed=0))
        job = Generate(request_id=1, adapter=path, sampling=sampling, tenant="t")
        place = stack.enter_context(self.replicas.place(job, revision))
        await stack.enter_async_context(place.replica.leases.lease(revision))
        return place.replica


@asynccontextmanager
async def serving(root: Path, *, capacity: int = 1) -> AsyncIterator[Stage]:
    CALLER.set(Caller("t"))
    store, tasks, replicas = CheckpointStore(root / "store", root / "memory"), Tasks(), Replicas()
    found = Revisions(store, RowFolder(root / "rows"), replicas, tasks)
    for name in "01":
        engine = EngineProcess("tests.engines.sampler", RANKS)
        replicas.add(Replica(name, engine, AdapterLeases(found, engine, tasks, capacity=capacity)))
    room = WaitingRoom(Load(count=100, tokens=100_000))
    execution = Execution(replicas, found, room, Metrics(), max_wait_s=0)
    async with asyncio.timeout(LIMIT_S):
        await replicas.start(tasks)
        try:
            yield Stage(replicas, execution, found, store)
        finally:
            await tasks.stop()
            await replicas.close()
            found.close()


@pytest.fixture(autouse=True)
def _no_other_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "RESTART_DELAY_S", 2 * LIMIT_S)


async def die(replica: Replica) -> None:
    with pytest.raises(EngineDied):
        await replica.engine.call(Die())


async def test_two_adapters_get_a_replica_each(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage, AsyncExitStack() as stack:
        kept = [await stage.keep(stack, stage.publish()) for _ in range(2)]
        assert {replica.name for replica in kept} == {"0", "1"}
        assert all(replica.under_way["t"] >= 40 for replica in kept)
    assert not any(replica.under_way for replica in kept)


async def test_who_waits_for_a_place_at_a_replica_that_dies_gets_one_at_another(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as stage, AsyncExitStack() as first, AsyncExitStack() as second:
        one = await stage.keep(first, stage.publish())
        other = await stage.keep(second, stage.publish())
        paths = [stage.publish() for _ in range(6)]
        waiting = [asyncio.create_task(stage.sample(path)) for path in paths]
        while not (one.under_way["t"] >= 80 and other.under_way["t"] >= 80):
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        await die(one)
        await second.aclose()
        assert await asyncio.gather(*waiting) == paths


async def test_a_replica_that_is_drained_ends_what_it_has_and_gets_no_more(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, capacity=4) as stage, AsyncExitStack() as stack:
        replica = await stage.keep(stack, stage.publish())
        draining = asyncio.create_task(stage.replicas.drain(replica.name, LIMIT_S))
        paths = [stage.publish() for _ in range(4)]
        assert [await stage.sample(path) for path in paths] == paths
        assert [each.name for each in stage.replicas.up] != [replica.name]
        assert len(stage.replicas.up) == 1
        assert not draining.done()
        assert replica.engine.ready
        await stack.aclose()
        await draining
        assert not replica.engine.ready
        assert await stage.sample(paths[0]) == paths[0]

        (last,) = stage.replicas.up
        await stage.replicas.drain(last.name, 0)
        with pytest.raises(Unavailable, match="shutting down"):
            await stage.sample()


async def test_what_is_with_a_replica_that_is_drained_too_fast_goes_to_another(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as stage:
        asked = [asyncio.create_task(stage.sample()) for _ in range(20)]
        while not any(replica.under_way for replica in stage.replicas):
            await asyncio.sleep(0)
        await stage.replicas.drain("0", 0)
        assert await asyncio.gather(*asked) == [BASE_MODEL] * 20


async def test_an_engine_that_died_has_kept_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as stage:
        await stage.sample()
        assert stage.replicas.found["0", "none", "new"] == 1
        (replica, other) = stage.replicas
        replica.cache_tokens = 100
        await stage.sample()
        await stage.sample()
        assert stage.replicas.found["0", "none", "kept"] == 1
        await die(replica)
        assert replica.kept.tokens == 0
        await stage.sample()
        assert stage.replicas.found[other.name, "none", "new"] == 1

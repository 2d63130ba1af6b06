"""Places for adapters: who gets one when, and whom nobody holds up. The engine has no model."""

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointStore, SnapshotMemory, open_row
from mint_core.engine_host import process as engine_process
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import CheckpointNotFound, EngineFault, InvalidRequest
from mint_core.hosting.tasks import Tasks
from mint_core.lora.row_layout import Matrix, RowLayout
from sampler_service.adapters import leases, revisions
from sampler_service.adapters.leases import AdapterLeases
from sampler_service.adapters.revisions import AnotherRevision, Revisions
from sampler_service.adapters.row_folder import RowFolder
from sampler_service.jobs import BASE_MODEL, AdapterAbsent
from tests.checkpoint_files import publish_as
from tests.engines.sampler_jobs import Die, Use
from tests.unit.checkpoint_store.conftest import adapter
from tests.unit.checkpoint_store.rows import (
    LAYOUT,
    NUMBERS_BYTES,
    remember,
    snapshot,
    write_snapshot,
)

LIMIT_S = 30.0
RANKS = 8  # of each adapter, as it is stored


@dataclass
class Front:
    """Adapters of two tenants, in a store and in memory."""

    root: Path
    leases: AdapterLeases
    revisions: Revisions
    store: CheckpointStore
    memory: SnapshotMemory
    engine: EngineProcess
    _names: "itertools.count[int]" = field(default_factory=itertools.count)

    def publish(self, tenant: str = "t", name: str | None = None) -> str:
        manifest = snapshot(name=name or f"a{next(self._names)}", tenant=tenant)
        return str(publish_as(self.store, manifest, adapter()["weights"]).revision_path)

    @asynccontextmanager
    async def lease(self, path: str, tenant: str) -> AsyncIterator[str]:
        found = await self.revisions.resolve(path, tenant) if path != BASE_MODEL else None
        async with self.leases.lease(found) as revision:
            yield revision

    async def use(self, path: str, tenant: str = "t") -> tuple[str, ...]:
        """What the engine holds while the adapter is leased."""
        while True:
            with suppress(AdapterAbsent):
                async with self.lease(path, tenant) as revision:
                    held: tuple[str, ...] = await self.engine.call(Use(revision))
                    assert revision in held
                    return held

    async def keep(self, stack: AsyncExitStack, path: str, tenant: str = "t") -> None:
        """Uses an adapter until the stack is left."""
        await stack.enter_async_context(self.lease(path, tenant))

    def start(self, path: str, tenant: str = "t") -> "asyncio.Task[tuple[str, ...]]":
        return asyncio.create_task(self.use(path, tenant))

    def row_files(self) -> list[Path]:
        return list(self.root.glob("rows/*/*.row"))

    async def until_fetched(self, count: int) -> None:
        while len(self.row_files()) < count:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(
    root: Path, *, capacity: int = 2, ranks: int = 100 * RANKS, row_bytes: int = 0
) -> AsyncIterator[Front]:
    engine = EngineProcess("tests.engines.sampler", ranks)
    store = CheckpointStore(root / "store", root / "memory")
    tasks = Tasks()
    found = Revisions(store, RowFolder(root / "rows", row_bytes), engine, tasks)
    held = AdapterLeases(found, engine, tasks, capacity=capacity)
    front = Front(root, held, found, store, SnapshotMemory(root / "memory"), engine)

    async with asyncio.timeout(LIMIT_S):
        await engine.start()
        tasks.start(held.run(), "adapter leases")
        try:
            yield front
        finally:
            await tasks.stop()
            await engine.close()
            found.close()


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "RESTART_DELAY_S", 0.05)


async def test_more_adapters_than_places_all_get_their_turn(tmp_path: Path) -> None:
    async with serving(tmp_path, capacity=3) as front:
        paths = [front.publish() for _ in range(12)]
        held = await asyncio.gather(*(front.use(path) for path in paths * 4))
    assert max(map(len, held)) == 3


async def test_memory_for_ranks_is_kept(tmp_path: Path) -> None:
    async with serving(tmp_path, capacity=10, ranks=2 * RANKS + 1) as front:
        paths = [front.publish() for _ in range(6)]
        held = await asyncio.gather(*(front.use(path) for path in paths * 3))
    assert max(map(len, held)) == 2


async def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    async with serving(tmp_path) as front:
        a, b, c = (front.publish() for _ in range(3))
        for path in (a, b, a):
            await front.use(path)
        assert await front.use(c) == (a, c)


async def test_whoever_waits_for_a_place_holds_up_nobody_else(tmp_path: Path) -> None:
    async with serving(tmp_path) as front, AsyncExitStack() as stack:
        a, b, c, d = (front.publish() for _ in range(4))
        await front.keep(stack, a)
        await front.keep(stack, b)
        waiting = [front.start(c), front.start(d)]
        await front.until_fetched(4)  # though there is no room

        async with front.lease(BASE_MODEL, "t"):
            pass
        assert await front.use(a) == await front.use(b) == (a, b)
        assert not any(task.done() for task in waiting)
        await stack.aclose()
        await asyncio.gather(*waiting)


async def test_adapters_in_constant_use_make_room_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "PATIENCE_S", 0.02)
    async with serving(tmp_path) as front:
        hot = [front.publish() for _ in range(2)]
        counts = dict.fromkeys(hot, 0)
        stopped = asyncio.Event()

        async def press(path: str) -> None:
            """Another request begins before the last one ends, always."""
            while not stopped.is_set():
                async with front.lease(path, "t"):
                    counts[path] += 1
                    await asyncio.sleep(0.002)

        pressing = [asyncio.create_task(press(path)) for path in hot for _ in range(4)]
        while not all(counts.values()):
            await asyncio.sleep(0)
        for _ in range(3):
            await front.use(front.publish())
            before = dict(counts)
            while any(counts[path] == before[path] for path in hot):  # they come back
                await asyncio.sleep(0)
        stopped.set()
        await asyncio.gather(*pressing)


async def test_an_adapter_that_need_not_go_after_all_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "PATIENCE_S", 0.0)
    async with serving(tmp_path, capacity=1) as front, AsyncExitStack() as stack:
        a, b = front.publish(), front.publish()
        await front.keep(stack, a)
        leaving, again = front.start(b), None
        await front.until_fetched(2)
        await asyncio.sleep(0.05)
        again = front.start(a)  # must wait, since `a` is to go
        for _ in range(5):
            await asyncio.sleep(0)
        assert not again.done()
        leaving.cancel()
        assert await again == (a,)


async def test_tenants_take_turns(tmp_path: Path) -> None:
    async with serving(tmp_path, capacity=1) as front, AsyncExitStack() as stack:
        order: list[str] = []

        async def use(path: str, tenant: str) -> None:
            async with front.lease(path, tenant):
                order.append(tenant)

        await front.keep(stack, front.publish())
        many = [asyncio.create_task(use(front.publish(), "t")) for _ in range(6)]
        await front.until_fetched(7)
        few = [asyncio.create_task(use(front.publish("u"), "u")) for _ in range(2)]
        await front.until_fetched(9)
        await asyncio.sleep(0.01)
        await stack.aclose()
        await asyncio.gather(*many, *few)
    assert order[:4].count("u") == 2
    assert len(order) == 8


async def test_who_leaves_while_waiting_leaves_no_trace(tmp_path: Path) -> None:
    async with serving(tmp_path, capacity=1) as front, AsyncExitStack() as stack:
        a, b = front.publish(), front.publish()
        await front.keep(stack, a)
        leaving = [front.start(b) for _ in range(3)]
        await front.until_fetched(2)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        await stack.aclose()
        for path in (b, a, b):
            assert await front.use(path) == (path,)


async def test_who_leaves_as_the_place_is_granted_gives_it_back(tmp_path: Path) -> None:
    async with serving(tmp_path, capacity=1) as front:
        for _ in range(20):
            leaving = front.start(front.publish())
            for _ in range(3):
                await asyncio.sleep(0)
            leaving.cancel()
            assert len(await front.use(front.publish())) == 1


async def test_an_adapter_that_the_engine_refuses_says_why_and_holds_no_place(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, capacity=1) as front:
        bad, good = front.publish(name="bad"), front.publish()
        for _ in range(2):
            refused = await asyncio.gather(
                *(front.use(bad) for _ in range(3)), return_exceptions=True
            )
            assert {type(error) for error in refused} == {InvalidRequest}
            assert await front.use(good) == (good,)


async def test_an_engine_that_died_gets_its_adapters_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as front:
        a, b = front.publish(), front.publish()
        await front.use(a)

        async def die_with(path: str) -> None:
            async with front.lease(path, "t") as revision:
                with pytest.raises(EngineFault):
                    await front.engine.call(Die())
                await front.engine.call(Use(revision))

        with pytest.raises(AdapterAbsent):  # there is no other reason
            await die_with(b)
        assert await front.use(a) == (a,)
        assert await front.use(b) == (a, b)


async def test_three_revisions_of_one_run_are_there_together(tmp_path: Path) -> None:
    async with serving(tmp_path, capacity=4) as front, AsyncExitStack() as stack:
        paths = [front.publish(name="policy") for _ in range(3)]
        assert len(set(paths)) == 3
        for path in paths:
            await front.keep(stack, path)
        newest = await front.use("mint://r-1/sampler_weights/policy")
    assert list(newest) == paths


def other_layout() -> RowLayout:
    """Other places for the same numbers."""
    names = ("lm_head", "model.layers.0.q_proj")
    places = {
        name: (Matrix(2 + 56 * i, 4, 6, 6, 1), Matrix(26 + 56 * i, 8, 4, 1, 8))
        for i, name in enumerate(names)
    }
    return RowLayout.of(LAYOUT.size, places)


async def test_a_row_in_memory_needs_no_file_of_ours(tmp_path: Path) -> None:
    async with serving(tmp_path) as front:
        path = str(remember(front.memory, snapshot()).revision_path)
        assert await front.use(path) == (path,)
        assert not front.row_files()
        with pytest.raises(CheckpointNotFound):
            await front.use(path, "other")


async def test_a_row_that_lies_otherwise_is_laid_out_anew(tmp_path: Path) -> None:
    async with serving(tmp_path) as front:
        manifest = snapshot()
        draft = front.memory.draft(NUMBERS_BYTES)
        assert draft is not None
        write_snapshot(draft, manifest, 5, other_layout())
        front.memory.place(draft, manifest, stored=False)
        path = str(manifest.revision_path)

        assert await front.use(path) == (path,)

        (file,) = front.row_files()
        expected = LAYOUT.row(manifest.spec, adapter(seed=5)["weights"])
        assert np.array_equal(open_row(file, path).numbers(), expected)


async def test_a_row_that_has_left_memory_comes_from_the_store(tmp_path: Path) -> None:
    async with serving(tmp_path, capacity=1) as front:
        manifest = remember(front.memory, snapshot(), stored=True)
        publish_as(front.store, manifest, adapter()["weights"])
        path = str(manifest.revision_path)
        await front.use(path)
        await front.use(front.publish())
        front.memory.release(manifest.revision_path)
        assert await front.use(path) == (path,)


async def test_files_are_verified_once_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    verify = CheckpointStore.verify
    monkeypatch.setattr(
        CheckpointStore,
        "verify",
        lambda store, found: verified.append(found.manifest.name) or verify(store, found),
    )
    limit_bytes = 3 * NUMBERS_BYTES
    async with serving(tmp_path, capacity=1, row_bytes=limit_bytes) as front:
        paths = [front.publish() for _ in range(5)]
        for path in paths * 2:  # each time all others have gone since
            await front.use(path)
            assert sum(file.stat().st_size for file in front.row_files()) <= limit_bytes
    assert len(verified) == 5


async def test_a_deleted_revision_is_soon_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisions, "CHECK_INTERVAL_S", 0.0)
    monkeypatch.setattr(CheckpointStore, "appear_limit_s", 0.0)
    async with serving(tmp_path) as front:
        path = front.publish()
        await front.use(path)
        front.store.delete(path, tenant="t")
        with pytest.raises(CheckpointNotFound):
            await front.use(path)
        assert not front.row_files()


async def test_another_adapter_by_a_path_that_was_had_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revisions, "CHECK_INTERVAL_S", 0.0)
    monkeypatch.setattr(CheckpointStore, "appear_limit_s", 0.0)
    async with serving(tmp_path) as front:
        path = front.publish(name="a")
        await front.use(path)
        for gone_between in (False, True):
            shutil.rmtree(tmp_path / "store")
            if gone_between:
                with pytest.raises(CheckpointNotFound):
                    await front.use(path)
            assert front.publish(name="a") == path
            with pytest.raises(AnotherRevision, match="is another than this sampler has had"):
                await front.use(path)


async def test_a_snapshot_that_another_host_has_announced_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointStore, "appear_limit_s", 0.0)
    async with serving(tmp_path) as front:
        manifest = snapshot()
        front.store.announce(manifest)
        waiting = front.start(str(manifest.path))
        with pytest.raises(CheckpointNotFound):
            await front.use(str(manifest.path), "other")
        assert not waiting.done()
        publish_as(front.store, manifest, adapter()["weights"])
        assert await waiting == (str(manifest.revision_path),)


async def test_requests_that_come_together_look_for_a_new_revision_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    find = CheckpointStore.find
    monkeypatch.setattr(
        CheckpointStore,
        "find",
        lambda store, path, **wanted: looks.append(path) or find(store, path, **wanted),
    )
    async with serving(tmp_path) as front:
        path = str(remember(front.memory, snapshot()).revision_path)
        await asyncio.gather(*(front.use(path) for _ in range(100)))
    assert looks == [path]


async def test_many_loads_go_on_at_the_same_time(tmp_path: Path) -> None:
    async with serving(tmp_path, capacity=64) as front:
        paths: Sequence[str] = [front.publish() for _ in range(64)]
        held = await asyncio.gather(*(front.use(path) for path in paths))
    assert max(map(len, held)) == 64

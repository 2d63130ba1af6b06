"""Expired checkpoints are removed when their time is over, not an hour later."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from checkpoint_store import CheckpointStore, Swept, parse_path
from tests.checkpoint_files import publish_checkpoint
from tests.unit.checkpoint_store.conftest import SPEC, adapter
from trainer_service.checkpoints import sweeping
from trainer_service.checkpoints.sweeping import Sweeper

LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "LEAST_INTERVAL_S", 0.01)


class CountingStore(CheckpointStore):
    """Tells how often it has been swept."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.sweeps = 0
        self.fails = False

    def sweep(self, *, now: datetime | None = None) -> Swept:
        self.sweeps += 1
        if self.fails:
            raise OSError("the disk is away")
        return super().sweep(now=now)

    def save(self, name: str, expire_time: datetime) -> str:
        manifest = publish_checkpoint(
            self,
            training_run_id="r-1",
            kind="sampler_weights",
            name=name,
            tenant="t",
            base_model="tiny",
            base_fingerprint="f00d",
            spec=SPEC,
            weights=adapter()["weights"],
            step=1,
            expire_time=expire_time,
        )
        return str(manifest.revision_path)

    def gone(self, path: str) -> bool:
        folder = self._layout.revision_folder(parse_path(path))
        return not (folder / "manifest.json").exists()


@asynccontextmanager
async def sweeping_of(store: CountingStore) -> AsyncIterator[Sweeper]:
    sweeper = Sweeper(store)
    running = asyncio.create_task(sweeper.run())
    async with asyncio.timeout(LIMIT_S):
        yield sweeper
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def until(store: CountingStore, *paths: str) -> None:
    while not all(store.gone(path) for path in paths):
        await asyncio.sleep(0.01)  # nothing tells of a file's end


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def test_what_expires_is_removed_at_its_time(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    found = store.save("found", soon(0.2))  # before the sweeper began
    async with sweeping_of(store) as sweeper:
        for name, seconds in (("later", 3600.0), ("told", 0.1)):
            expire_time = soon(seconds)
            path = store.save(name, expire_time)
            sweeper.note_expiry(expire_time)
        await until(store, found, path)
    assert [manifest.name for manifest in store.list(tenant="t")] == ["later"]
    assert store.sweeps <= 4


async def test_nothing_is_swept_without_need(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    async with sweeping_of(store) as sweeper:
        while not store.sweeps:
            await asyncio.sleep(0)
        for _ in range(10):
            sweeper.note_expiry(None)
            sweeper.note_expiry(soon(3600))
            await asyncio.sleep(0.01)
    assert store.sweeps == 1


async def test_a_store_that_fails_is_swept_when_it_can_be(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    store.fails = True
    async with sweeping_of(store) as sweeper:
        for number in itertools.count():
            sweeper.note_expiry(soon(0.01))
            if store.sweeps > 2:
                break
            assert number < 10_000
            await asyncio.sleep(0.005)
        store.fails = False
        path = store.save("a", soon(0.05))
        sweeper.note_expiry(soon(0.05))
        await until(store, path)

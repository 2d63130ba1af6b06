"""Publishing for samplers: what is acknowledged when, and what becomes of it."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from checkpoint_store import (
    CheckpointStore,
    Manifest,
    SnapshotMemory,
    find_row,
    new_manifest,
    open_row,
)
from checkpoint_store.adapter_files import write_files
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.objects.object_store import ObjectStore, parse_address
from mint_core.errors import CheckpointNotFound, EngineFault, ResourceExhausted
from mint_core.lora.spec import AdapterArrays
from tests.object_servers import ObjectServer
from tests.unit.checkpoint_store.conftest import SPEC, adapter
from tests.unit.checkpoint_store.rows import NUMBERS_BYTES, write_snapshot
from tests.unit.trainer_service.queue.test_admission import origin
from trainer_service.checkpoints.handoff import Handoff
from trainer_service.checkpoints.staging import Write
from trainer_service.errors import RowNotWritten
from trainer_service.jobs import SaveCheckpoint, StoreRow, WriteRow

LIMIT_S = 30.0
ROOM_BYTES = NUMBERS_BYTES + 65536
RUN = replace(origin("ann", "r-1"), spec=SPEC, row_bytes=NUMBERS_BYTES)


@dataclass
class Trainer:
    """A handoff whose engine writes one adapter after the other."""

    root: Path
    memory: SnapshotMemory | None
    handoff: Handoff
    written: list[WriteRow | SaveCheckpoint] = field(default_factory=list)
    error: Exception | None = None  # what the engine says of rows in memory

    async def write(self, job: object) -> object:
        """As the engine does of one row after the other."""
        assert isinstance(job, WriteRow | SaveCheckpoint)
        self.written.append(job)
        number = len(self.written)
        if isinstance(job, SaveCheckpoint):
            weights = adapter(seed=number)["weights"]
            return await asyncio.to_thread(_write_files, job.folder, job.manifest, weights)
        if self.error is not None:
            raise self.error
        try:
            await asyncio.to_thread(write_snapshot, Path(job.file), job.manifest, number)
        except OSError as error:
            raise RowNotWritten(str(job.manifest.path), Path(job.file), error) from error
        return None

    async def publish(
        self,
        name: str | None = None,
        ttl_s: float | None = None,
        sequence: int = 0,
        mark: str = "",
    ) -> Manifest:
        expire_time = None if ttl_s is None else datetime.now(UTC) + timedelta(seconds=ttl_s)
        manifest = new_manifest(
            name,
            Manifest(
                training_run_id=RUN.training_run_id,
                kind="sampler_weights",
                tenant=RUN.tenant,
                base_model=RUN.base_model,
                base_fingerprint=RUN.base_fingerprint,
                spec=RUN.spec,
                step=1,
                sequence=sequence,
                mark=mark,
                expire_time=expire_time,
            ),
        )
        return await self.handoff.publish(manifest, RUN.row_bytes, self.write)

    @property
    def folder(self) -> Path:
        return self.root / "memory"

    @property
    def store(self) -> CheckpointStore:
        """As another host sees it."""
        return CheckpointStore(self.root / "store")

    @property
    def here(self) -> CheckpointStore:
        return CheckpointStore(self.root / "store", self.folder)

    def stored(self, published: Manifest) -> bool:
        return self.store.has(published.revision_path)

    def in_memory(self, published: Manifest) -> bool:
        return find_row(self.folder, published.revision_path) is not None

    def break_store(self) -> None:
        shutil.rmtree(self.root / "store", ignore_errors=True)
        (self.root / "store").touch()

    def mend_store(self) -> None:
        (self.root / "store").unlink()


def _write_files(folder: str, manifest: Manifest, weights: AdapterArrays) -> object:
    return write_files(
        Path(folder),
        weights,
        spec=manifest.spec,
        base_model=manifest.base_model,
        base_fingerprint=manifest.base_fingerprint,
        step=manifest.step,
    )


async def store_row(job: object) -> object:
    """As an engine does it."""
    assert isinstance(job, StoreRow)
    row = await asyncio.to_thread(open_row, Path(job.file), str(job.manifest.revision_path))
    return await asyncio.to_thread(_write_files, job.folder, job.manifest, row.weights())


@asynccontextmanager
async def training(
    root: Path, limit_bytes: int | None = 100 * ROOM_BYTES, store: Write = store_row
) -> AsyncIterator[Trainer]:
    memory = SnapshotMemory(root / "memory", limit_bytes) if limit_bytes else None
    handoff = Handoff(CheckpointStore(root / "store"), memory, store)
    trainer = Trainer(root, memory, handoff)
    async with asyncio.timeout(LIMIT_S):
        handoff.start()
        yield trainer
        await handoff.stop()


async def test_a_snapshot_is_acknowledged_from_memory_and_stored_behind_it(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        trainer.break_store()
        published = await trainer.publish()

        assert trainer.in_memory(published)
        assert published.step == 1
        row = trainer.here.open(str(published.path), tenant="ann").weights()
        trainer.mend_store()
    stored = trainer.store.open(str(published.revision_path), tenant="ann")
    assert stored.manifest.step == 1
    assert all((stored.weights()[name] == row[name]).all() for name in row)
    assert not trainer.folder.exists()


async def test_snapshots_are_stored_in_order(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        published = [await trainer.publish() for _ in range(5)]
    written = [
        (trainer.root / "store/r-1/sampler_weights" / p.name / "1").stat().st_mtime_ns
        for p in published
    ]
    assert written == sorted(written)


async def test_a_named_checkpoint_is_stored_first_and_put_into_memory_beside(
    tmp_path: Path,
) -> None:
    async with training(tmp_path) as trainer:
        first, second = await trainer.publish("a"), await trainer.publish("a")
        assert str(first.revision_path) == "mint://r-1/sampler_weights/a@1"
        assert str(second.revision_path) == "mint://r-1/sampler_weights/a@2"
        for published in (first, second):
            assert trainer.stored(published)
            assert trainer.in_memory(published)
            opened = trainer.here.open(str(published.revision_path), tenant="ann")
            assert opened.row is not None
            stored = trainer.store.open(str(published.revision_path), tenant="ann").weights()
            assert all((opened.weights()[name] == stored[name]).all() for name in stored)


async def test_a_call_that_is_done_again_after_a_crash_names_one_revision(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        first = await trainer.publish("a", sequence=7, mark="x")
        assert await trainer.publish("a", sequence=7, mark="x") == first
        opened = trainer.here.open(str(first.path), tenant="ann")
        assert opened.row is None  # that in memory is of the second time
        stored = trainer.store.open(str(first.path), tenant="ann").weights()
        assert all((opened.weights()[name] == stored[name]).all() for name in stored)
        later = await trainer.publish("a", sequence=8, mark="y")
        assert str(later.revision_path) == "mint://r-1/sampler_weights/a@2"


async def test_a_call_of_another_timeline_makes_a_revision_of_its_own(tmp_path: Path) -> None:
    """After a backup was restored the same number belongs to another call."""
    async with training(tmp_path) as trainer:
        first = await trainer.publish("a", sequence=7, mark="x")
        other = await trainer.publish("a", sequence=7, mark="y")
        assert (first.revision, other.revision) == (1, 2)
        before_marks = await trainer.publish("b", sequence=7)
        assert await trainer.publish("b", sequence=7) == before_marks
        assert (await trainer.publish("b", sequence=7, mark="z")).revision == 2


async def test_a_named_checkpoint_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        trainer.break_store()
        with pytest.raises(FileExistsError):
            await trainer.publish("a")
        assert trainer.memory is not None
        assert trainer.memory.size_bytes == 0
        trainer.mend_store()


async def test_a_store_that_fails_is_told_and_tried_again_with_the_next(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        trainer.break_store()
        failed = [await trainer.publish() for _ in range(2)]
        told = asyncio.Event()
        trainer.handoff.followers.add(told.set)
        while str(failed[1].revision_path) not in trainer.handoff.troubles.get(
            RUN.training_run_id, ""
        ):
            await told.wait()
            told.clear()
        assert "cannot be stored" in trainer.handoff.troubles[RUN.training_run_id]
        assert trainer.handoff.unstored == 2

        trainer.mend_store()
        last = await trainer.publish()
        while trainer.handoff.unstored:
            await asyncio.sleep(0)
        assert all(trainer.stored(published) for published in (*failed, last))
        while trainer.handoff.troubles:
            await asyncio.sleep(0)
        assert told.is_set()


async def test_what_never_could_be_stored_is_left_to_the_next_trainer(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        trainer.break_store()
        published = await trainer.publish()
    trainer.mend_store()
    assert trainer.in_memory(published)

    async with training(tmp_path) as trainer:
        while trainer.handoff.unstored:
            await asyncio.sleep(0)
    assert trainer.stored(published)
    assert not trainer.folder.exists()


async def test_an_object_store_that_fails_is_asked_once_at_the_end(
    object_server: ObjectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = parse_address(object_server.store())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    root = ObjectPath(ObjectStore(address), address.prefix)
    store = CheckpointStore(root, local=tmp_path / "beside")
    memory = SnapshotMemory(tmp_path / "memory", 100 * ROOM_BYTES)
    trainer = Trainer(tmp_path, memory, Handoff(store, memory, store_row))
    published = [await trainer.publish() for _ in range(3)]
    assert all(trainer.in_memory(each) for each in published)
    caplog.clear()

    await trainer.handoff.stop()

    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "403 Forbidden SignatureDoesNotMatch" in line]) == 1
    for each in published:
        assert f"snapshot {each.revision_path} is in memory alone; the next trainer may" in str(
            lines
        )
    assert len(SnapshotMemory(tmp_path / "memory", 100 * ROOM_BYTES).unstored()) == 3


@pytest.mark.parametrize("limit_bytes", [None, ROOM_BYTES // 2])
async def test_without_room_a_snapshot_is_stored_before_it_is_acknowledged(
    tmp_path: Path, limit_bytes: int | None
) -> None:
    async with training(tmp_path, limit_bytes) as trainer:
        published = await trainer.publish()
        assert trainer.stored(published)
        assert not published.named
        assert not list((tmp_path / "store/.staging").iterdir())


async def test_memory_that_others_have_filled_sends_it_through_the_store(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        full = OSError(28, "No space left on device")
        trainer.error = RowNotWritten("path", Path("memory"), full)
        published = await trainer.publish()
        assert trainer.stored(published)
        assert len(trainer.written) == 2
        assert isinstance(trainer.error, ResourceExhausted)


async def test_memory_that_was_cleared_sends_it_through_the_store(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        first = await trainer.publish()
        while not trainer.stored(first):
            await asyncio.sleep(0)
        shutil.rmtree(trainer.folder)  # as a system may do when its user logs out
        for _ in range(2):
            assert trainer.stored(await trainer.publish())
        assert trainer.here.open(str(first.path), tenant="ann").row is None
        await trainer.handoff.delete_run(RUN, named=True)


async def test_an_engine_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        trainer.error = EngineFault("it died")
        with pytest.raises(EngineFault):
            await trainer.publish()
        assert trainer.memory is not None
        assert trainer.memory.size_bytes == 0
        assert not list(tmp_path.glob("store/r-1/sampler_weights/*"))


async def test_memory_stays_within_its_limit_and_the_store_has_the_rest(tmp_path: Path) -> None:
    async with training(tmp_path, 3 * ROOM_BYTES) as trainer:
        published = [await trainer.publish() for _ in range(12)]
        assert trainer.memory is not None
        assert trainer.memory.size_bytes <= 3 * ROOM_BYTES
        while trainer.handoff.unstored:
            await asyncio.sleep(0)
        assert all(trainer.here.open(str(p.path), tenant="ann").weights() for p in published)
        assert sum(trainer.in_memory(p) for p in published) <= 3


async def test_a_ttl_ends_the_copy_in_memory_alone(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        published = await trainer.publish(ttl_s=0.2)
        while trainer.in_memory(published):
            await asyncio.sleep(0)
        assert trainer.here.open(str(published.path), tenant="ann").row is None


async def test_a_run_that_is_deleted_takes_its_snapshots_with_it(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        published = [await trainer.publish() for _ in range(3)]
        named = await trainer.publish("a")
        await trainer.handoff.delete_run(RUN, named=False)
        for p in published:
            with pytest.raises(CheckpointNotFound):
                trainer.here.open(str(p.path), tenant="ann")
        assert trainer.here.open(str(named.path), tenant="ann")
    assert [str(m.path) for m in trainer.store.list(tenant="ann")] == [str(named.path)]
    assert all(not trainer.stored(p) for p in published)


async def test_other_hosts_know_that_a_snapshot_comes(tmp_path: Path) -> None:
    may_store = asyncio.Event()

    async def store_late(job: object) -> object:
        await may_store.wait()
        return await store_row(job)

    async with training(tmp_path, store=store_late) as trainer:
        published = await trainer.publish()
        assert trainer.store.announced(str(published.path), tenant="ann")
        assert not trainer.store.announced(str(published.path), tenant="bob")
        may_store.set()
        while trainer.handoff.unstored or trainer.store.announced(
            str(published.path), tenant="ann"
        ):
            await asyncio.sleep(0)
        assert trainer.store.open(str(published.path), tenant="ann")

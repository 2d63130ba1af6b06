"""Snapshots in memory: found by others on the host, bounded, and gone with their trainer."""

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import (
    CheckpointDamaged,
    CheckpointStore,
    Manifest,
    SnapshotMemory,
    find_row,
    snapshot_folder,
)
from mint_core.errors import CheckpointNotFound, FailedPrecondition, InvalidRequest
from tests.checkpoint_files import publish_as
from tests.unit.checkpoint_store.conftest import adapter
from tests.unit.checkpoint_store.memory.test_published_row import OLD_FILE
from tests.unit.checkpoint_store.rows import NUMBERS_BYTES, remember, snapshot

ROOM_BYTES = NUMBERS_BYTES + 65536  # for one row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memory"


@pytest.fixture
def seeing_store(tmp_path: Path, folder: Path) -> CheckpointStore:
    """A store that looks into memory, too."""
    return CheckpointStore(tmp_path / "store", folder)


def found(folder: Path, *manifests: Manifest) -> list[bool]:
    return [find_row(folder, m.revision_path) is not None for m in manifests]


def test_a_snapshot_opens_before_it_is_stored(folder: Path, seeing_store: CheckpointStore) -> None:
    memory = SnapshotMemory(folder)
    manifest = remember(memory, snapshot(step=7), seed=1)

    for path in (manifest.path, manifest.revision_path):
        opened = seeing_store.open(str(path), tenant="t")
        assert opened.manifest.step == 7
        expected = adapter(seed=1)["weights"]
        read = opened.weights()
        assert all(np.array_equal(read[name], expected[name]) for name in expected)
        with pytest.raises(CheckpointNotFound):
            seeing_store.open(str(path), tenant="other")
    assert not seeing_store.has(manifest.revision_path)


def test_the_oldest_that_are_stored_make_room(folder: Path) -> None:
    memory = SnapshotMemory(folder, 3 * ROOM_BYTES)
    first, second = (remember(memory, snapshot(), stored=True) for _ in range(2))
    kept = remember(memory, snapshot())
    for _ in range(5):
        newest = remember(memory, snapshot(), stored=True)
        assert memory.size_bytes <= 3 * ROOM_BYTES

    assert found(folder, first, second, kept, newest) == [False, False, True, True]


def test_what_is_not_stored_stays_and_there_is_no_room(folder: Path) -> None:
    memory = SnapshotMemory(folder, 2 * ROOM_BYTES)
    stored = remember(memory, snapshot(), stored=True)
    unstored = remember(memory, snapshot())
    assert memory.draft(3 * ROOM_BYTES) is None
    assert found(folder, stored, unstored) == [True, True]  # nothing went in vain
    remember(memory, snapshot())
    assert memory.draft(NUMBERS_BYTES) is None

    memory.stored(unstored.revision_path)

    assert memory.draft(NUMBERS_BYTES) is not None
    assert found(folder, stored, unstored) == [False, False]


def test_what_could_not_be_stored_goes_last(folder: Path) -> None:
    memory = SnapshotMemory(folder, 2 * ROOM_BYTES)
    lost = remember(memory, snapshot())
    memory.give_up(lost.revision_path)
    stored = remember(memory, snapshot(), stored=True)

    newer = remember(memory, snapshot())
    assert found(folder, lost, stored, newer) == [True, False, True]
    remember(memory, snapshot())
    assert found(folder, lost, newer) == [False, True]
    assert not memory.has(lost.revision_path)


def test_a_draft_that_was_prepared_is_used_and_counts(folder: Path) -> None:
    memory = SnapshotMemory(folder, 2 * ROOM_BYTES)
    memory.prepare(NUMBERS_BYTES)
    memory.prepare(NUMBERS_BYTES)
    (spare,) = folder.glob("*/draft-*")
    assert spare.stat().st_size == ROOM_BYTES
    assert memory.size_bytes == ROOM_BYTES

    assert memory.draft(NUMBERS_BYTES) == spare
    memory.prepare(NUMBERS_BYTES)
    other = memory.draft(NUMBERS_BYTES - 4)  # of another size: the spare goes

    assert other is not None
    assert list(folder.glob("*/draft-*")) == [spare]  # nobody has written to `other`
    memory.discard(spare)
    memory.discard(other)
    assert memory.size_bytes == 0
    assert not list(folder.glob("*/draft-*"))


def test_a_release_waits_for_the_store(folder: Path) -> None:
    memory = SnapshotMemory(folder)
    early, late = remember(memory, snapshot(), stored=True), remember(memory, snapshot())
    memory.release(early.revision_path)
    memory.release(late.revision_path)
    assert found(folder, early, late) == [False, True]
    memory.stored(late.revision_path)
    assert found(folder, late) == [False]


def test_a_runs_snapshots_go_with_it(folder: Path) -> None:
    memory = SnapshotMemory(folder)
    mine, other = remember(memory, snapshot()), remember(memory, snapshot(training_run_id="r-2"))
    memory.remove_run("r-1")
    assert found(folder, mine, other) == [False, True]


def test_memory_ends_with_its_trainer_and_keeps_what_the_store_lacks(folder: Path) -> None:
    first, second = SnapshotMemory(folder), SnapshotMemory(folder)
    remember(first, snapshot(), stored=True)
    lacking = remember(second, snapshot())
    first.close()
    second.close()
    assert found(folder, lacking) == [True]

    third = SnapshotMemory(folder)
    assert third.unstored() == [lacking.revision_path]
    third.stored(lacking.revision_path)
    third.close()

    assert not folder.exists()


DIE = """
import os, sys
from pathlib import Path
from checkpoint_store import SnapshotMemory
from tests.unit.checkpoint_store.rows import *
memory = SnapshotMemory(Path(sys.argv[1]))
unnamed = remember(memory, snapshot())
remember(memory, snapshot(name="a"), stored=True)
memory.draft(NUMBERS_BYTES).write_bytes(b"torn")
torn = remember(memory, snapshot())
file = next(Path(sys.argv[1]).glob(f"*/*/{torn.name}@1"))
file.write_bytes(file.read_bytes()[:-1])
print(unnamed.name, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_next_trainer_takes_over_what_a_killed_one_left(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIE, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -9, done.stderr

    memory = SnapshotMemory(folder)

    (rescued,) = memory.unstored()
    assert rescued.name == done.stdout.strip()
    assert memory.open(rescued).manifest.name == rescued.name
    assert len(list(folder.iterdir())) == 1
    assert memory.size_bytes < 2 * ROOM_BYTES
    memory.stored(rescued)
    assert memory.size_bytes == 0  # it was kept for the store alone


def test_a_row_that_an_older_version_left_is_told_once_and_goes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = folder / "trainer-gone/r-1/old@1"
    left.parent.mkdir(parents=True)
    folder.chmod(0o700)
    shutil.copy(OLD_FILE, left)

    memory = SnapshotMemory(folder)

    assert not memory.unstored()
    assert not left.exists()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "`old@1` of checkpoint `mint://r-1/sampler_weights/old@1` is torn, or not of" in warning


def test_a_torn_row_is_refused_by_name_until_it_is_stored(
    folder: Path, seeing_store: CheckpointStore
) -> None:
    manifest = remember(SnapshotMemory(folder), snapshot(), seed=1)
    (file,) = folder.glob("*/r-1/*")
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(CheckpointDamaged, match=f"`{file.name}` of checkpoint"):
        seeing_store.open(str(manifest.path), tenant="t")
    publish_as(seeing_store, manifest, adapter(seed=1)["weights"])

    opened = seeing_store.open(str(manifest.path), tenant="t")
    assert opened.row is None
    assert opened.weights().keys() == adapter()["weights"].keys()


def test_a_named_revision_is_the_stores_and_memory_only_makes_it_faster(
    folder: Path, seeing_store: CheckpointStore
) -> None:
    memory = SnapshotMemory(folder)
    remember(memory, snapshot(name="a"), stored=True)  # as left by a store that is no more
    with pytest.raises(CheckpointNotFound):
        seeing_store.open("mint://r-1/sampler_weights/a", tenant="t")

    manifest = snapshot(name="a")
    published = publish_as(seeing_store, manifest, adapter(seed=2)["weights"])
    assert seeing_store.open(str(published.path), tenant="t").row is None
    again = publish_as(seeing_store, manifest, adapter(seed=2)["weights"])
    remember(memory, again, seed=2, stored=True)

    opened = seeing_store.open(str(again.path), tenant="t")
    assert opened.row is not None
    expected = adapter(seed=2)["weights"]
    assert all(np.array_equal(opened.weights()[name], expected[name]) for name in expected)
    seeing_store.delete(str(published.path), tenant="t")
    with pytest.raises(CheckpointNotFound):
        seeing_store.open(str(again.revision_path), tenant="t")


def test_after_its_time_the_stored_copy_is_used(
    folder: Path, seeing_store: CheckpointStore
) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    manifest = remember(SnapshotMemory(folder), snapshot(expire_time=past))
    with pytest.raises(CheckpointNotFound):
        seeing_store.open(str(manifest.path), tenant="t")
    publish_as(seeing_store, manifest, adapter()["weights"])
    assert seeing_store.open(str(manifest.path), tenant="t").row is None


def test_a_folder_that_others_can_enter_is_neither_used_nor_read(folder: Path) -> None:
    manifest = remember(SnapshotMemory(folder), snapshot())
    folder.chmod(0o755)
    assert found(folder, manifest) == [False]
    with pytest.raises(FailedPrecondition, match=r"`snapshot_memory_folder` .*others than this"):
        SnapshotMemory(folder)
    folder.chmod(0o700)
    assert found(folder, manifest) == [True]
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert found(link, manifest) == [False]


def test_both_services_find_the_folder_by_the_stores_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store")
    (tmp_path / "store").mkdir()
    by_name, by_link = (snapshot_folder(None, str(tmp_path / name)) for name in ("store", "link"))
    assert by_name == by_link
    assert by_name != snapshot_folder(None, str(tmp_path / "other"))
    assert snapshot_folder(tmp_path / "chosen", str(tmp_path / "store")) == tmp_path / "chosen"


def test_an_announced_snapshot_is_the_tenants_until_it_comes_or_a_day_has_passed(
    store: CheckpointStore,
) -> None:
    coming, never = snapshot(), snapshot()
    for manifest in (coming, never):
        store.announce(manifest)
        assert store.announced(str(manifest.revision_path), tenant="t")
        assert not store.announced(str(manifest.path), tenant="other")
        with pytest.raises(CheckpointNotFound):
            store.open(str(manifest.path), tenant="t")

    publish_as(store, coming, adapter()["weights"])
    assert not store.announced(str(coming.path), tenant="t")
    assert store.open(str(coming.path), tenant="t").manifest.revision == 1

    store.sweep(now=datetime.now(UTC) + timedelta(hours=23))
    assert store.announced(str(never.path), tenant="t")
    store.sweep(now=datetime.now(UTC) + timedelta(hours=25))
    assert not store.announced(str(never.path), tenant="t")
    store.recant(never.path)  # once more does no harm


def test_a_name_of_a_snapshots_form_is_not_given() -> None:
    with pytest.raises(InvalidRequest, match="has the form of those that unnamed snapshots get"):
        snapshot(name=snapshot().name)

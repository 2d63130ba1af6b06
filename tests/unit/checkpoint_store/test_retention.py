"""What a sweep removes, and what it keeps."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from checkpoint_store import CheckpointStore
from mint_core.errors import CheckpointNotFound
from tests.unit.checkpoint_store.conftest import Publish

PATH = "mint://r-1/sampler_weights/a"
HOUR = timedelta(hours=1)


def gone(store: CheckpointStore, path: str) -> bool:
    try:
        store.find(path, tenant="t")
    except CheckpointNotFound:
        return True
    return False


def test_a_fresh_store_has_nothing_to_sweep(store: CheckpointStore) -> None:
    assert store.sweep().removed == 0


def test_the_newest_revision_of_a_name_stays(store: CheckpointStore, publish: Publish) -> None:
    path = publish()
    assert store.sweep(now=datetime.now(UTC) + 10_000 * HOUR).removed == 0
    assert not gone(store, path)


def test_an_old_revision_stays_a_day_after_its_last_use(
    store: CheckpointStore, publish: Publish
) -> None:
    old, new = publish(), publish()
    now = datetime.now(UTC)

    assert store.sweep(now=now + 23 * HOUR).removed == 0
    assert store.sweep(now=now + 25 * HOUR).removed == 1
    assert gone(store, old)
    assert str(store.find(PATH, tenant="t").manifest.revision_path) == new
    assert publish() == f"{PATH}@3"


@pytest.mark.parametrize("opens", [True, False])
def test_use_keeps_an_unnamed_snapshot(
    store: CheckpointStore, publish: Publish, opens: bool
) -> None:
    path = publish(None)
    lease = store.open(path, tenant="t").folder / "last_used"
    lease.unlink()
    if opens:
        store.open(path, tenant="t")
    else:
        store.find(path, tenant="t").note_use()
    used = datetime.fromtimestamp(lease.stat().st_mtime, UTC)

    assert store.sweep(now=used + 23 * HOUR).removed == 0
    assert store.sweep(now=used + 25 * HOUR).removed == 1
    assert gone(store, path)


def test_an_unnamed_snapshot_leaves_nothing_behind(
    store: CheckpointStore, publish: Publish, tmp_path: Path
) -> None:
    publish(None)
    store.sweep(now=datetime.now(UTC) + 25 * HOUR)
    assert list((tmp_path / "store/r-1/sampler_weights").iterdir()) == []


def test_a_longer_lifetime_outlasts_the_day(store: CheckpointStore, publish: Publish) -> None:
    now = datetime.now(UTC)
    path = publish(None, expire_time=now + 48 * HOUR)
    assert store.sweep(now=now + 47 * HOUR).removed == 0
    assert not gone(store, path)
    assert store.sweep(now=now + 49 * HOUR).removed == 1


def test_what_has_expired_is_removed(
    store: CheckpointStore, publish: Publish, tmp_path: Path
) -> None:
    publish(expire_time=datetime.now(UTC) - HOUR)
    assert store.sweep().removed == 1
    assert [f.name for f in (tmp_path / "store/r-1/sampler_weights/a/1").iterdir()] == ["deleted"]


def test_what_a_dead_writer_left_is_removed_after_a_day(
    store: CheckpointStore, tmp_path: Path
) -> None:
    left = tmp_path / "store/.staging/0123"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")

    store.sweep(now=datetime.now(UTC) + 23 * HOUR)
    assert left.exists()
    store.sweep(now=datetime.now(UTC) + 25 * HOUR)
    assert not left.exists()

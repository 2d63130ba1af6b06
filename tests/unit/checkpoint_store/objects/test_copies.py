"""Copies, changes and deletions, each of which a request does once."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from checkpoint_store import CheckpointStore, Manifest, revisions
from mint_core.errors import AlreadyExists, CheckpointNotFound, InvalidRequest
from tests.checkpoint_files import moments, same
from tests.unit.checkpoint_store.conftest import Publish, adapter

PATH = "mint://r-1/sampler_weights/a"
HOUR = timedelta(hours=1)


@pytest.fixture
def elsewhere(store: CheckpointStore, tmp_path: Path) -> CheckpointStore:
    """The same store after a restart, swept as every trainer does when it starts."""
    store = CheckpointStore(tmp_path / "store")
    store.sweep()
    return store


def renamed(manifest: Manifest) -> Manifest:
    return replace(manifest, metadata={"changed": "yes"})


def test_a_copy_is_the_same_under_another_name(store: CheckpointStore, publish: Publish) -> None:
    arrays = adapter(seed=1)
    path = publish("s", kind="weights", metadata={"note": "kept"}, **arrays)

    copy = store.copy(path, "t", tenant="t")

    opened, source = store.open(str(copy.path), tenant="t"), store.open(path, tenant="t")
    assert str(copy.revision_path) == "mint://r-1/weights/t@1"
    assert opened.manifest.source == path
    assert opened.manifest.files == source.manifest.files
    assert (opened.manifest.step, opened.manifest.metadata) == (3, {"note": "kept"})
    exp_avg, exp_avg_sq = moments(opened)
    assert same(exp_avg, arrays["exp_avg"])
    assert same(exp_avg_sq, arrays["exp_avg_sq"])


def test_a_copy_outlives_what_it_is_of(store: CheckpointStore, publish: Publish) -> None:
    path = publish()
    copy = str(store.copy(path, "b", tenant="t").revision_path)
    folder = store.open(copy, tenant="t").folder
    assert (folder / "adapter_model.safetensors").stat().st_nlink == 2

    store.delete(path, tenant="t")

    assert store.open(copy, tenant="t").weights().keys() == adapter()["weights"].keys()


def test_without_links_files_are_copied(
    store: CheckpointStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "no links here")

    path = publish()
    monkeypatch.setattr("os.link", refuse)
    copy = str(store.copy(path, "b", tenant="t").revision_path)

    folder = store.open(copy, tenant="t").folder
    assert (folder / "adapter_model.safetensors").stat().st_nlink == 1


def test_a_copy_keeps_its_own_time(store: CheckpointStore, publish: Publish) -> None:
    now = datetime.now(UTC)
    path = publish(expire_time=now + HOUR)
    kept = str(store.copy(path, "kept", tenant="t").revision_path)
    shorter = str(store.copy(path, "shorter", tenant="t", expire_time=now + HOUR / 2).revision_path)

    assert store.sweep(now=now + 2 * HOUR).removed == 2

    store.open(kept, tenant="t")
    for gone in (path, shorter):
        with pytest.raises(CheckpointNotFound):
            store.open(gone, tenant="t")


def test_what_cannot_be_copied(store: CheckpointStore, publish: Publish) -> None:
    path = publish()
    publish("b")
    with pytest.raises(AlreadyExists, match="exists"):
        store.copy(path, "b", tenant="t")
    with pytest.raises(CheckpointNotFound):
        store.copy(path, "c", tenant="other")
    with pytest.raises(InvalidRequest, match="cannot name a checkpoint"):
        store.copy(path, "../c", tenant="t")


def test_a_request_copies_once(
    store: CheckpointStore, publish: Publish, elsewhere: CheckpointStore
) -> None:
    path = publish()
    first = store.copy(path, "b", tenant="t", request="one")
    assert elsewhere.copy(path, "b", tenant="t", request="one") == first
    with pytest.raises(AlreadyExists):
        elsewhere.copy(path, "b", tenant="t", request="two")


def test_a_change_keeps_revision_and_files(store: CheckpointStore, publish: Publish) -> None:
    path = publish()
    before = store.open(path, tenant="t").manifest

    changed = store.update(PATH, tenant="t", change=renamed)

    assert changed == renamed(before) == store.open(path, tenant="t").manifest
    assert store.list(tenant="t") == [changed]


def test_an_unnamed_snapshot_cannot_be_changed(store: CheckpointStore, publish: Publish) -> None:
    with pytest.raises(InvalidRequest, match="copy it under a name"):
        store.update(publish(None), tenant="t", change=renamed)


def test_a_change_does_not_bring_back_what_is_being_deleted(
    store: CheckpointStore, publish: Publish, tmp_path: Path
) -> None:
    """A deletion that is half done when the manifest is written."""
    path = publish()
    folder = tmp_path / "store/r-1/sampler_weights/a/1"

    def delete_meanwhile(manifest: Manifest) -> Manifest:
        (folder / "deleted").write_text("")
        return renamed(manifest)

    with pytest.raises(CheckpointNotFound):
        store.update(path, tenant="t", change=delete_meanwhile)

    with pytest.raises(CheckpointNotFound):
        store.open(path, tenant="t")
    assert store.list(tenant="t") == []


def test_a_deletion_sent_again_leaves_what_came_since(
    store: CheckpointStore, publish: Publish, elsewhere: CheckpointStore
) -> None:
    publish()
    publish()
    store.delete(PATH, tenant="t", request="one")
    newer = publish()
    elsewhere.sweep()

    elsewhere.delete(PATH, tenant="t", request="one")

    assert str(elsewhere.find(PATH, tenant="t").manifest.revision_path) == newer
    elsewhere.delete(PATH, tenant="t", request="two")
    with pytest.raises(CheckpointNotFound):
        elsewhere.find(PATH, tenant="t")


def test_a_deletion_cut_short_is_ended_when_it_is_sent_again(
    store: CheckpointStore, publish: Publish, tmp_path: Path
) -> None:
    first, second = publish(), publish()
    revisions.bury(tmp_path / "store/r-1/sampler_weights/a/2", "one")  # and then it was killed

    store.delete(PATH, tenant="t", request="one")

    for path in (first, second):
        with pytest.raises(CheckpointNotFound):
            store.open(path, tenant="t")


@pytest.mark.parametrize("name", ["a", None])
def test_deletions_are_remembered_for_a_day(
    store: CheckpointStore, publish: Publish, name: str | None
) -> None:
    path = publish(name).partition("@")[0]
    store.delete(path, tenant="t", request="one")
    now = datetime.now(UTC)

    store.sweep(now=now + 23 * HOUR)
    store.delete(path, tenant="t", request="one")
    if name is None:
        store.sweep(now=now + 25 * HOUR)
        with pytest.raises(CheckpointNotFound):
            store.delete(path, tenant="t", request="one")


def test_a_sweep_tells_when_the_next_time_is_over(store: CheckpointStore, publish: Publish) -> None:
    now = datetime.now(UTC)
    publish("past", expire_time=now - HOUR)
    publish("later", expire_time=now + 2 * HOUR)
    publish("next", expire_time=now + HOUR)
    publish(None, expire_time=now + HOUR / 2)  # of its copy in memory, which is not swept

    swept = store.sweep(now=now)

    assert (swept.removed, swept.next_expiry) == (1, now + HOUR)

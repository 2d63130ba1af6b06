"""Lists read what is new to them, and see whatever anybody has changed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from checkpoint_store import CheckpointStore, Manifest
from tests.unit.checkpoint_store.conftest import Publish

WATCHED = ("open", "os.listdir", "os.scandir")
_looked: list[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _looked is not None and event in WATCHED:
        _looked.append(str(arguments[0]))


sys.addaudithook(_note)  # of the interpreter: the store knows nothing of it


@contextmanager
def looking() -> Iterator[list[str]]:
    """Files and folders that are opened meanwhile."""
    global _looked
    _looked = looked = []
    try:
        yield looked
    finally:
        _looked = None


def paths(store: CheckpointStore, tenant: str = "t") -> list[str]:
    return sorted(str(manifest.revision_path) for manifest in store.list(tenant=tenant))


@pytest.fixture
def elsewhere(tmp_path: Path) -> CheckpointStore:
    """The same store, as another process has it."""
    return CheckpointStore(tmp_path / "store")


def test_a_list_reads_what_is_new_and_looks_at_nothing_of_others(
    store: CheckpointStore, publish: Publish
) -> None:
    for name in "abc":
        publish(name)
        publish(name, training_run_id="r-other", tenant="other")
    before = paths(store)
    publish("d")

    with looking() as looked:
        assert paths(store) == [*before, "mint://r-1/sampler_weights/d@1"]

    manifests = [path for path in looked if path.endswith("manifest.json")]
    assert [Path(path).parent.parent.name for path in manifests] == ["d"]
    assert looked
    assert not any("r-other" in path for path in looked)


def test_what_others_change_is_seen_at_once(
    store: CheckpointStore, elsewhere: CheckpointStore, publish: Publish
) -> None:
    for name in "abc":
        publish(name)
    a, b = "mint://r-1/sampler_weights/a", "mint://r-1/sampler_weights/b"
    assert len(paths(store)) == len(paths(elsewhere)) == 3

    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, metadata={"of": "another"})

    elsewhere.update(a, tenant="t", change=change)
    elsewhere.delete(b, tenant="t")
    elsewhere.copy(a, "d", tenant="t")
    elsewhere.delete("mint://r-1/sampler_weights/c", tenant="t")
    publish("c")

    found = {manifest.name: manifest for manifest in store.list(tenant="t")}
    assert sorted(found) == ["a", "c", "d"]
    assert found["a"].metadata == found["d"].metadata == {"of": "another"}
    assert found["c"].revision == 2
    assert store.find(a, tenant="t").manifest == found["a"]


def test_what_a_tenant_has_is_counted_by_use(
    store: CheckpointStore, elsewhere: CheckpointStore, publish: Publish
) -> None:
    said = {"training_run_id": "r-2", "tenant": "other"}
    paths = [publish(**said), publish(None, **said), publish("u", request="r", **said)]
    paths.append(publish("m", kind="merged_weights", request="e", **said))
    one = store.find(paths[0], tenant="other").manifest.size_bytes
    uses = ("checkpoints", "snapshots", "uploads", "merged_models")

    assert store.size_bytes("other") == dict.fromkeys(uses, one)
    assert store.size_bytes("t") == {}
    store.copy(paths[0], "b", tenant="other")
    assert store.size_bytes("other")["checkpoints"] == 2 * one
    assert elsewhere.size_bytes("other") == {}
    elsewhere.sweep()
    assert elsewhere.size_bytes("other") == store.size_bytes("other")

    elsewhere.delete(paths[2], tenant="other")
    store.sweep(now=datetime.now(UTC) + timedelta(days=2))
    sizes = store.size_bytes("other")
    assert sizes == {"checkpoints": 2 * one, "merged_models": one}
    store.delete_run("r-2", tenant="other", named=True)
    assert store.size_bytes("other") == {}


def test_a_run_that_is_gone_is_forgotten(
    store: CheckpointStore, publish: Publish, tmp_path: Path
) -> None:
    publish()
    (tmp_path / "store/r-1").rename(tmp_path / "elsewhere")

    store.sweep()

    assert not any(store.size_bytes("t").values())
    assert paths(store) == []

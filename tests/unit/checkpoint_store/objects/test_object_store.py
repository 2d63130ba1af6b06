"""The store in an object store: what holds in a folder, and what is different there."""

import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointDamaged, CheckpointStore, Manifest, new_manifest, open_store
from checkpoint_store.copies import Copies, ObjectFolder
from checkpoint_store.errors import ObjectStoreFailed
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.objects.object_store import ObjectStore, parse_address
from mint_core.errors import AlreadyExists, CheckpointNotFound, FailedPrecondition
from tests.checkpoint_files import moments, publish_as, publish_checkpoint
from tests.object_servers import BUCKET, ObjectServer
from tests.unit.checkpoint_store import test_retention as retention_tests
from tests.unit.checkpoint_store import test_store as store_tests
from tests.unit.checkpoint_store.conftest import SPEC, Publish, adapter
from tests.unit.checkpoint_store.objects import test_copies as copy_tests

PATH = "mint://r-1/weights/s"
FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors")
DAY = timedelta(days=1)

# What is true of every store.
test_opens = store_tests.test_what_is_published_is_what_opens
test_newest = store_tests.test_a_name_means_its_newest_revision
test_refused = store_tests.test_without_overwrite_a_name_that_exists_is_refused
test_writers = store_tests.test_writers_of_one_name_at_the_same_time
test_unnamed = store_tests.test_an_unnamed_snapshot_gets_a_path_of_its_own
test_tenants = store_tests.test_another_tenants_checkpoint_is_not_found
test_not_found = store_tests.test_what_was_never_saved_is_not_found
test_list = store_tests.test_the_list_has_the_newest_revision_of_each_name
test_uncovers = store_tests.test_a_deleted_revision_uncovers_the_one_before
test_numbers = store_tests.test_the_number_of_a_deleted_revision_is_not_given_again
test_runs_end = store_tests.test_deleting_a_run_keeps_named_checkpoints_unless_asked
test_expiry = store_tests.test_a_checkpoint_is_not_found_after_its_time
test_fresh = retention_tests.test_a_fresh_store_has_nothing_to_sweep
test_day = retention_tests.test_an_old_revision_stays_a_day_after_its_last_use
test_copy = copy_tests.test_a_copy_is_the_same_under_another_name
test_copys_time = copy_tests.test_a_copy_keeps_its_own_time
test_no_copy = copy_tests.test_what_cannot_be_copied
test_copied_once = copy_tests.test_a_request_copies_once
test_change = copy_tests.test_a_change_keeps_revision_and_files
test_deleted_once = copy_tests.test_a_deletion_sent_again_leaves_what_came_since
test_remembered = copy_tests.test_deletions_are_remembered_for_a_day


@pytest.fixture
def address(object_server: ObjectServer) -> str:
    return object_server.store()


@pytest.fixture
def store(address: str, tmp_path: Path) -> CheckpointStore:
    return open_store(address, tmp_path / "local", saves=True)


@pytest.fixture
def elsewhere(address: str, tmp_path: Path) -> CheckpointStore:
    return open_store(address, tmp_path / "elsewhere", saves=True)


@pytest.fixture
def objects(address: str) -> ObjectStore:
    return ObjectStore(parse_address(address))


@pytest.fixture
def state(publish: Publish) -> str:
    return publish("s", kind="weights", step=1, **adapter(seed=1))


def keys(objects: ObjectStore) -> list[str]:
    """Of all objects, without the store's prefix."""
    prefix = objects.address.prefix
    return sorted(key.removeprefix(prefix + "/") for key in objects.below(prefix))


def key_of(objects: ObjectStore, file: str) -> str:
    """Of the only file of that name."""
    (key,) = (key for key in keys(objects) if key.endswith(f"/{file}"))
    return f"{objects.address.prefix}/{key}"


def is_whole(store: CheckpointStore, path: str, seed: int) -> bool:
    read, expected = store.open(path, tenant="t").weights(), adapter(seed=seed)["weights"]
    return all(np.array_equal(read[name], expected[name]) for name in expected)


def test_another_host_reads_what_this_one_has_saved(
    address: str, state: str, tmp_path: Path
) -> None:
    elsewhere = open_store(address, tmp_path / "elsewhere", saves=False)
    opened = elsewhere.open(PATH, tenant="t")

    assert str(opened.manifest.revision_path) == state
    assert is_whole(elsewhere, PATH, 1)
    assert moments(opened)[0].keys() == adapter()["exp_avg"].keys()
    assert sorted(file.name for file in opened.folder.iterdir()) == sorted(FILES)
    assert tmp_path / "elsewhere" in opened.folder.parents


def test_nothing_is_fetched_twice_while_there_is_room(
    store: CheckpointStore, objects: ObjectStore, state: str
) -> None:
    store.open(PATH, tenant="t")
    objects.remove(key_of(objects, FILES[1]))
    assert is_whole(store, state, 1)


def test_a_damaged_copy_is_fetched_again(store: CheckpointStore, state: str) -> None:
    folder = store.open(PATH, tenant="t").folder
    content = bytearray((folder / FILES[1]).read_bytes())
    content[-1] ^= 1
    (folder / FILES[1]).write_bytes(content)
    (folder / FILES[2]).write_bytes(b"")

    assert is_whole(store, state, 1)


def test_copies_go_when_there_is_no_room_and_nobody_reads_them(
    store: CheckpointStore, objects: ObjectStore, publish: Publish, tmp_path: Path
) -> None:
    paths = [publish(name, kind="weights", step=1, **adapter(seed=1)) for name in "abc"]
    opened = [store.open(path, tenant="t") for path in paths]
    os.utime(opened[0].folder, (1.0, 1.0))

    small = Copies(tmp_path / "local" / ".copies", limit_bytes=1)
    manifest = opened[2].manifest
    place = ObjectPath(objects, objects.address.prefix) / "r-1/weights/c" / manifest.files_folder
    small.bring(manifest, ObjectFolder(place))

    assert [found.folder.exists() for found in opened] == [False, True, True]
    assert is_whole(store, paths[0], 1)


@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", ["flipped", "torn"])
def test_damage_in_the_store_is_found_and_the_file_named(
    store: CheckpointStore, objects: ObjectStore, state: str, file: str, harm: str
) -> None:
    key = key_of(objects, file)
    content = bytearray(objects.read(key))
    content[len(content) // 2] ^= 1
    objects.write(key, bytes(content if harm == "flipped" else content[:-9]))

    with pytest.raises(CheckpointDamaged, match=f"`{file}` of checkpoint `{PATH}@1`"):
        store.open(PATH, tenant="t")


def test_a_missing_file_is_named(store: CheckpointStore, objects: ObjectStore, state: str) -> None:
    objects.remove(key_of(objects, FILES[0]))
    with pytest.raises(CheckpointDamaged, match=rf"`{FILES[0]}` of checkpoint .* is missing"):
        store.open(PATH, tenant="t")


def test_a_deletion_leaves_a_tombstone_alone(
    store: CheckpointStore, objects: ObjectStore, state: str
) -> None:
    found = store.find(PATH, tenant="t")
    store.delete(PATH, tenant="t")

    assert keys(objects) == ["r-1/weights/s/1/deleted"]
    with pytest.raises(CheckpointNotFound):
        store.verify(found)


def test_a_refused_save_leaves_nothing(
    store: CheckpointStore, objects: ObjectStore, publish: Publish, state: str
) -> None:
    before = keys(objects)
    with pytest.raises(AlreadyExists):
        publish("s", kind="weights", overwrite=False)
    assert keys(objects) == before


def test_a_snapshot_is_announced_stored_and_kept_by_its_use(
    store: CheckpointStore, objects: ObjectStore
) -> None:
    snapshot = new_manifest(
        None,
        Manifest(
            training_run_id="r-1",
            kind="sampler_weights",
            tenant="t",
            base_model="tiny",
            base_fingerprint="f00d",
            spec=SPEC,
            step=1,
        ),
    )
    path = str(snapshot.path)
    assert not store.announced(path, tenant="t")
    store.announce(snapshot)
    assert store.announced(path, tenant="t")
    assert not store.announced(path, tenant="other")

    publish_as(store, snapshot, adapter()["weights"])

    assert store.has(snapshot.revision_path)
    assert not store.announced(path, tenant="t")
    store.find(path, tenant="t").note_use()
    assert f"r-1/sampler_weights/{snapshot.name}/1/last_used" in keys(objects)
    assert store.sweep(now=datetime.now(UTC) + 2 * DAY).removed == 1
    assert keys(objects) == []


def save(store: CheckpointStore, step: int) -> None:
    publish_checkpoint(
        store,
        training_run_id="r-1",
        kind="weights",
        name="s",
        tenant="t",
        base_model="tiny",
        base_fingerprint="f00d",
        spec=SPEC,
        step=step,
        **adapter(seed=step),
    )


class Killed(BaseException):
    """The process is no more."""


class DyingObjects(ObjectStore):
    """Does not live to make its n-th change."""

    left = 0

    def write(self, key: str, content: bytes | Path) -> None:
        self._count()
        super().write(key, content)

    def create(self, key: str, content: bytes) -> bool:
        self._count()
        return super().create(key, content)

    def remove(self, key: str) -> None:
        self._count()
        super().remove(key)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("act", ["save", "delete"])
def test_a_process_killed_at_any_change_leaves_all_or_nothing(
    store: CheckpointStore,
    objects: ObjectStore,
    publish: Publish,
    state: str,
    tmp_path: Path,
    act: str,
) -> None:
    publish("s", kind="weights", step=2, **adapter(seed=2))
    steps = []
    for count in range(20):
        dying = DyingObjects(objects.address)
        dying.left = count
        other = CheckpointStore(
            ObjectPath(dying, objects.address.prefix), local=tmp_path / f"other-{count}"
        )
        try:
            if act == "save":
                save(other, 3)
            else:
                other.delete(f"{PATH}@2", tenant="t")
            break
        except CheckpointNotFound:
            break  # the one before has come so far
        except Killed:
            (found,) = store.list(tenant="t")
            assert is_whole(store, PATH, found.step)
            steps.append(found.step)
            with pytest.raises(CheckpointNotFound):
                store.open(f"{PATH}@3", tenant="t")

    assert steps == ([2, 2, 2, 2] if act == "save" else [2, 2, 1])
    assert is_whole(store, PATH, 3 if act == "save" else 1)
    store.sweep(now=datetime.now(UTC) + 2 * DAY)
    folders = {key.split("/")[3] for key in keys(objects)}
    assert len([name for name in folders if name.startswith("files-")]) == 1


def test_a_sweep_leaves_files_that_may_still_be_on_their_way(
    store: CheckpointStore, objects: ObjectStore, state: str
) -> None:
    key = f"{objects.address.prefix}/r-1/weights/s/files-0/adapter_config.json"
    objects.write(key, b"{}")
    store.sweep()
    assert objects.find(key) is not None
    store.sweep(now=datetime.now(UTC) + 2 * DAY)
    assert objects.find(key) is None


def test_a_manifest_that_was_sent_twice_is_published_once(objects: ObjectStore) -> None:
    """An answer that was lost makes the client's library send it again."""
    key = f"{objects.address.prefix}/manifest.json"
    assert objects.create(key, b"ours")
    assert objects.create(key, b"ours")
    assert not objects.create(key, b"theirs")
    assert objects.read(key) == b"ours"


def test_without_conditional_writes_writers_still_do_not_mix(
    store: CheckpointStore, objects: ObjectStore, tmp_path: Path
) -> None:
    unconditional = ObjectStore(objects.address, conditional=False)
    root = ObjectPath(unconditional, objects.address.prefix)
    writer = CheckpointStore(root, local=tmp_path / "writer")
    threads = [threading.Thread(target=save, args=(writer, step)) for step in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    newest = store.find(PATH, tenant="t").manifest.revision
    for revision in range(1, newest + 1):
        path = f"{PATH}@{revision}"
        assert is_whole(store, path, store.find(path, tenant="t").manifest.step)


def test_a_large_file_goes_in_parts(objects: ObjectStore, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(11 * 1024 * 1024)
    (tmp_path / "large").write_bytes(content)
    key = f"{objects.address.prefix}/large"

    objects.write(key, tmp_path / "large")
    objects.download(key, tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.parametrize(
    ("store", "problem"),
    [
        ("gs://bucket/x", "has the scheme `gs`"),
        ("s3:///x", "names no bucket"),
        ("s3://key:secret@bucket/x", "names no bucket, or more than one"),
        ("s3://bucket/x?acl=public", "has the option `acl`"),
        ("s3://bucket/x?endpoint=host:9000", "neither http:// nor https://"),
        ("s3://bucket/x#y", "has a `#`"),
    ],
)
def test_an_address_that_is_none_is_refused(store: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=problem) as caught:
        open_store(store, tmp_path, saves=True)
    assert "secret" not in caught.value.message


def test_an_address_is_taken_apart() -> None:
    found = parse_address("s3://bucket/a/b/?endpoint=http://host:1&region=eu-1")
    assert (found.bucket, found.prefix) == ("bucket", "a/b")
    assert (found.endpoint, found.region) == ("http://host:1", "eu-1")
    assert str(found) == "s3://bucket/a/b at http://host:1"


def test_a_store_that_cannot_be_used_is_refused_at_start(
    object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(store: str) -> str:
        with pytest.raises(FailedPrecondition) as caught:
            open_store(store, tmp_path, saves=True)
        return caught.value.message

    nowhere = "http://127.0.0.1:1"
    assert f"`store` s3://b/x at {nowhere} cannot be used: " in refusal(
        f"s3://b/x?endpoint={nowhere}"
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "cannot be used: 403 Forbidden SignatureDoesNotMatch; check" in refusal(
        object_server.store()
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package obstore; install it with `pip install 'mintrpc[s3]'`" in refusal(
        object_server.store()
    )


def test_endpoint_and_region_may_come_from_the_environment(
    object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_server.endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-9")
    objects = ObjectStore(parse_address(f"s3://{BUCKET}"))  # all of it, without a prefix

    objects.check(saves=True)
    objects.write("alone/x", b"1")

    assert "alone" in objects.children("")[0]


def test_a_store_that_fails_later_is_told(
    objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    failing = ObjectStore(objects.address)
    with pytest.raises(ObjectStoreFailed, match="failed: 403 Forbidden SignatureDoesNotMatch;"):
        failing.write("x", b"")

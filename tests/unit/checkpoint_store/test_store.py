"""Names, revisions, tenants, deletion."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointStore, WeightsNotFinite
from mint_core.errors import (
    AlreadyExists,
    CheckpointNotFound,
    InvalidRequest,
)
from mint_core.lora.spec import lora_a_name
from tests.busy_threads import no_thread_free
from tests.checkpoint_files import parts_of, same
from tests.unit.checkpoint_store.conftest import SPEC, Publish, adapter

PATH = "mint://r-1/sampler_weights/a"


def test_what_is_published_is_what_opens(store: CheckpointStore, publish: Publish) -> None:
    arrays = adapter(seed=1)
    path = publish("s", kind="weights", metadata={"note": "first"}, **arrays)

    opened = store.open(path, tenant="t")

    assert path == "mint://r-1/weights/s@1"
    for part, read in parts_of(opened).items():
        assert same(read, arrays[part])
    manifest = opened.manifest
    assert (manifest.spec, manifest.step, manifest.metadata) == (SPEC, 3, {"note": "first"})
    assert (manifest.base_model, manifest.base_fingerprint) == ("tiny", "f00d")
    assert manifest.size_bytes == sum((opened.folder / f).stat().st_size for f in manifest.files)


def test_a_transposed_view_is_stored_by_value(store: CheckpointStore, publish: Publish) -> None:
    weights = dict(adapter()["weights"])
    name = lora_a_name("lm_head")
    weights[name] = np.ascontiguousarray(weights[name].T).T
    assert not weights[name].flags.c_contiguous

    opened = store.open(publish(weights=weights), tenant="t")

    assert np.array_equal(opened.weights()[name], weights[name])


def test_a_name_means_its_newest_revision(store: CheckpointStore, publish: Publish) -> None:
    first = publish(step=1)
    second = publish(step=2)

    assert [first, second] == [f"{PATH}@1", f"{PATH}@2"]
    assert str(store.find(PATH, tenant="t").manifest.revision_path) == second
    assert store.open(PATH, tenant="t").manifest.step == 2
    assert store.open(first, tenant="t").manifest.step == 1


def test_a_second_store_on_the_same_folder_sees_everything(
    store: CheckpointStore, publish: Publish, tmp_path: Path
) -> None:
    elsewhere = CheckpointStore(tmp_path / "store")
    publish(step=1)
    assert elsewhere.open(PATH, tenant="t").manifest.step == 1
    publish(step=2)
    assert elsewhere.open(PATH, tenant="t").manifest.step == 2


def test_every_file_is_as_readable_as_the_umask_allows(
    store: CheckpointStore, publish: Publish, tmp_path: Path
) -> None:
    """Trainer and sampler may run as different users."""
    folder = store.open(publish("s", kind="weights", **adapter()), tenant="t").folder
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {file.name: file.stat().st_mode for file in folder.iterdir()} == {
        file.name: expected for file in folder.iterdir()
    }


def test_without_overwrite_a_name_that_exists_is_refused(
    store: CheckpointStore, publish: Publish
) -> None:
    publish("s", kind="weights", overwrite=False, step=1)

    with pytest.raises(AlreadyExists, match="`mint://r-1/weights/s` exists") as caught:
        publish("s", kind="weights", overwrite=False, step=2)

    assert caught.value.metadata == {"path": "mint://r-1/weights/s"}
    assert store.open("mint://r-1/weights/s", tenant="t").manifest.step == 1
    publish("s", kind="weights", overwrite=True, step=3)
    assert store.open("mint://r-1/weights/s", tenant="t").manifest.step == 3


@pytest.mark.parametrize("overwrite", [True, False])
def test_writers_of_one_name_at_the_same_time(
    store: CheckpointStore, publish: Publish, overwrite: bool
) -> None:
    """With `overwrite` all end as revisions; without, exactly one wins."""
    start = threading.Barrier(6)
    published: list[str] = []
    refused: list[AlreadyExists] = []

    def write(step: int) -> None:
        start.wait(timeout=30)
        try:
            published.append(publish(step=step, overwrite=overwrite))
        except AlreadyExists as error:
            refused.append(error)

    threads = [threading.Thread(target=write, args=(step,)) for step in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    wins = 6 if overwrite else 1
    assert sorted(published) == [f"{PATH}@{n}" for n in range(1, wins + 1)]
    assert len(refused) == 6 - wins
    assert len({store.open(path, tenant="t").manifest.step for path in published}) == wins


def test_an_unnamed_snapshot_gets_a_path_of_its_own(
    store: CheckpointStore, publish: Publish
) -> None:
    first, second = publish(None, step=1), publish(None, step=2)

    assert first != second
    assert store.open(first, tenant="t").manifest.step == 1
    assert not store.find(first, tenant="t").manifest.named
    assert store.list(tenant="t") == []


def test_another_tenants_checkpoint_is_not_found(store: CheckpointStore, publish: Publish) -> None:
    path = publish()

    for call in (store.open, store.find, store.delete):
        with pytest.raises(CheckpointNotFound, match="there is no checkpoint"):
            call(path, tenant="other")
    store.delete_run("r-1", tenant="other", named=True)

    assert store.list(tenant="other") == []
    assert store.open(path, tenant="t").manifest.tenant == "t"


@pytest.mark.parametrize(
    "path", [PATH, f"{PATH}@9", "mint://r-1/weights/a", "mint://r-2/weights/a"]
)
def test_what_was_never_saved_is_not_found(
    store: CheckpointStore, publish: Publish, path: str
) -> None:
    publish("b")
    with pytest.raises(CheckpointNotFound) as caught:
        store.open(path, tenant="t")
    assert caught.value.metadata == {"path": path}


def test_opening_can_demand_a_kind(store: CheckpointStore, publish: Publish) -> None:
    path = publish("s", kind="weights")
    with pytest.raises(
        InvalidRequest, match="is of kind `weights` where `sampler_weights` is needed"
    ):
        store.open(path, tenant="t", kind="sampler_weights")


def test_the_list_has_the_newest_revision_of_each_name(
    store: CheckpointStore, publish: Publish
) -> None:
    for name, kind in [("a", "sampler_weights"), ("b", "weights"), ("a", "sampler_weights")]:
        publish(name, kind=kind)
    publish("c", training_run_id="r-2")

    def paths(**filters: str) -> list[str]:
        return [str(m.revision_path) for m in store.list(tenant="t", **filters)]  # type: ignore[arg-type]

    assert paths() == ["mint://r-2/sampler_weights/c@1", f"{PATH}@2", "mint://r-1/weights/b@1"]
    assert paths(training_run_id="r-1") == [f"{PATH}@2", "mint://r-1/weights/b@1"]
    assert paths(kind="weights") == ["mint://r-1/weights/b@1"]


def test_a_deleted_revision_uncovers_the_one_before(
    store: CheckpointStore, publish: Publish
) -> None:
    publish(step=1)
    store.delete(publish(step=2), tenant="t")

    assert store.open(PATH, tenant="t").manifest.step == 1
    with pytest.raises(CheckpointNotFound):
        store.open(f"{PATH}@2", tenant="t")


def test_the_number_of_a_deleted_revision_is_not_given_again(
    store: CheckpointStore, publish: Publish
) -> None:
    publish()
    store.delete(PATH, tenant="t")
    store.sweep()

    with pytest.raises(CheckpointNotFound):
        store.find(PATH, tenant="t")
    assert publish(overwrite=False) == f"{PATH}@2"


def test_deleting_a_run_keeps_named_checkpoints_unless_asked(
    store: CheckpointStore, publish: Publish
) -> None:
    named, unnamed = publish(), publish(None)

    store.delete_run("r-1", tenant="t")
    with pytest.raises(CheckpointNotFound):
        store.open(unnamed, tenant="t")
    assert str(store.find(PATH, tenant="t").manifest.revision_path) == named

    store.delete_run("r-1", tenant="t", named=True)
    assert store.list(tenant="t") == []


def test_a_checkpoint_is_not_found_after_its_time(store: CheckpointStore, publish: Publish) -> None:
    past, future = (datetime.now(UTC) + timedelta(hours=h) for h in (-1, 1))
    publish(expire_time=past)
    publish("b", expire_time=future)

    with pytest.raises(CheckpointNotFound):
        store.open(PATH, tenant="t")
    assert [m.name for m in store.list(tenant="t")] == ["b"]
    assert publish(overwrite=False) == f"{PATH}@2"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["weights", "exp_avg", "exp_avg_sq"])
def test_what_is_not_finite_is_refused(
    store: CheckpointStore, publish: Publish, bad: float, kind: str
) -> None:
    arrays = adapter()
    arrays[kind][lora_a_name("lm_head")][0, 0] = bad

    with pytest.raises(
        WeightsNotFinite, match=r"`base_model.model.lm_head.lora_A.weight` .* NaN or Inf"
    ):
        publish("s", kind="weights", **arrays)

    assert store.list(tenant="t") == []


def test_arrays_that_are_no_such_adapter_are_refused(publish: Publish) -> None:
    weights = dict(adapter()["weights"])
    missing = weights.pop(lora_a_name("lm_head"))
    with pytest.raises(InvalidRequest, match=r"lm_head.lora_A.weight` .* is missing"):
        publish(weights=weights)
    with pytest.raises(InvalidRequest, match="rank 4 needs"):
        publish(weights=weights | {lora_a_name("lm_head"): missing[:3]})
    with pytest.raises(InvalidRequest, match="is float64; adapters are float32"):
        publish(weights=weights | {lora_a_name("lm_head"): missing.astype(np.float64)})
    with pytest.raises(InvalidRequest, match=r"`other` .* does not belong"):
        publish(weights=weights | {lora_a_name("lm_head"): missing, "other": missing})


def test_a_bad_name_is_refused_before_anything_is_written(publish: Publish, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"`name` '\.\./x' cannot name a checkpoint"):
        publish("../x")
    assert not (tmp_path / "store").exists()


async def test_those_who_must_not_block_wait_for_no_other_threads(
    store: CheckpointStore, publish: Publish
) -> None:
    """Of the loop's own executor, where other work may take all places."""
    publish()

    async with no_thread_free():
        (found,) = await store.in_turn("t", store.list, tenant="t")

    assert found.name == "a"

"""What one tenant may have in the store."""

from pathlib import Path

import pytest

from checkpoint_store import CheckpointStore
from checkpoint_store.errors import StoreQuotaExceeded
from tests.unit.checkpoint_store.conftest import Publish

PATH = "mint://r-1/sampler_weights/a"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store", quota_bytes=6000)


def test_a_tenant_has_its_share_and_no_more(store: CheckpointStore, publish: Publish) -> None:
    one = store.find(publish("a"), tenant="t").manifest.size_bytes
    while sum(store.size_bytes("t").values()) < 6000:  # the last one is taken, whatever its size
        publish("a")
    used = sum(store.size_bytes("t").values())

    with pytest.raises(StoreQuotaExceeded, match="delete some") as caught:
        store.copy(PATH, "b", tenant="t")
    assert caught.value.retry_after_s is None
    assert caught.value.metadata == {
        "used_bytes": str(used),
        "quota_bytes": "6000",
        "size_bytes": str(one),
    }
    with pytest.raises(StoreQuotaExceeded), store.staging("t"):
        pass
    publish("a", training_run_id="r-2", tenant="other")
    with store.staging("other", 1000):
        pass
    store.delete(f"{PATH}@1", tenant="t")
    store.delete(PATH, tenant="t")
    publish("a")
    with store.staging("t", 1000):
        pass


def test_what_is_under_way_counts(store: CheckpointStore) -> None:
    with store.staging("t", 4000):
        with pytest.raises(StoreQuotaExceeded), store.staging("t", 4000):
            pass
        with store.staging("t", 1000), store.staging("other", 4000):
            pass
    with store.staging("t", 4000):
        pass

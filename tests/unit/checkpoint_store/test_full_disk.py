"""A store on a disk without room."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointStore, Manifest, new_manifest
from mint_core.errors import ResourceExhausted
from mint_core.lora.spec import AdapterSpec
from tests.checkpoint_files import publish_as, publish_checkpoint
from tests.unit.checkpoint_store.conftest import SPEC, adapter

PAGE = 4096
FILES = 4  # of a training state
BIG = AdapterSpec(rank=512, alpha=32.0, use_rslora=False, seed=7, modules=SPEC.modules)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def save(store: CheckpointStore, step: int, spec: AdapterSpec = SPEC) -> None:
    publish_checkpoint(
        store,
        training_run_id="r-1",
        kind="weights",
        name="a",
        tenant="t",
        base_model="tiny",
        base_fingerprint="f00d",
        spec=spec,
        step=step,
        **adapter(seed=step, spec=spec),
    )


def leave(folder: Path, pages: int) -> Path:
    """Takes all of a disk but some pages."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        while file.write(bytes(PAGE)) == PAGE:
            if _free_pages(folder) <= pages:
                return filler
    raise AssertionError("no page at all was left")


def _free_pages(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize // PAGE


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("spec", [SPEC, BIG], ids=["small files", "large files"])
def test_a_save_without_room_is_refused_and_leaves_nothing(disk: Path, spec: AdapterSpec) -> None:
    """Whatever it was that had no room any more, the first file or the last."""
    store = CheckpointStore(disk)
    save(store, 1)
    store.open("mint://r-1/weights/a", tenant="t")
    before = names(disk)
    refusals = []
    for pages in range(0, 80, 1 if spec is SPEC else 9):
        filler = leave(disk, pages)
        try:
            save(store, 2, spec)
            break
        except ResourceExhausted as error:
            refusals.append(error.message)
        finally:
            filler.unlink()
        assert names(disk) == before
        assert store.open("mint://r-1/weights/a", tenant="t").manifest.step == 1

    message = "the checkpoint store has no space left; delete checkpoints, then send the call again"
    assert set(refusals) == {message}
    assert len(refusals) >= FILES
    save(store, 3)
    opened = store.open("mint://r-1/weights/a", tenant="t")
    expected = adapter(seed=3)["weights"]
    assert all(np.array_equal(opened.weights()[name], expected[name]) for name in expected)


def test_a_snapshot_that_cannot_even_be_announced_is_told(disk: Path) -> None:
    store = CheckpointStore(disk)
    filler = leave(disk, 0)
    manifest = new_manifest(
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
    with pytest.raises(OSError, match="No space left"):
        store.announce(manifest)
    with pytest.raises(ResourceExhausted, match="the checkpoint store has no space left"):
        publish_as(store, manifest, adapter()["weights"])
    filler.unlink()

    publish_as(store, manifest, adapter()["weights"])
    assert store.has(manifest.revision_path)
    assert names(disk) == [
        str(Path("r-1/sampler_weights", manifest.name, "1", file))
        for file in ("adapter_config.json", "adapter_model.safetensors", "manifest.json")
    ]


def test_a_deletion_needs_no_room(disk: Path) -> None:
    store = CheckpointStore(disk)
    save(store, 1)
    save(store, 2)
    leave(disk, 0)
    path = "mint://r-1/weights/a"

    store.delete(path, tenant="t", request="asked")
    store.delete(path, tenant="t", request="asked")

    assert store.list(tenant="t") == []
    assert names(disk / "r-1") == ["weights/a/1/deleted", "weights/a/2/deleted"]
    (disk / "filler").unlink()
    save(store, 3)
    assert store.open(path, tenant="t").manifest.revision == 3

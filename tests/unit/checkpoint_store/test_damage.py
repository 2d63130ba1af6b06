"""Torn and altered files, and writers killed at any line."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_store import CheckpointDamaged, CheckpointStore, WeightsNotFinite
from checkpoint_store.manifest import FileEntry, decode_manifest, encode_manifest
from mint_core.errors import CheckpointNotFound
from mint_core.lora.spec import lora_a_name
from tests.unit.checkpoint_store.conftest import Publish, adapter

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "manifest.json",
]
PATH = "mint://r-1/weights/s"


@pytest.fixture
def folder(store: CheckpointStore, publish: Publish) -> Path:
    """Of a training state."""
    return store.open(publish("s", kind="weights", **adapter()), tenant="t").folder


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_found_and_the_file_named(
    store: CheckpointStore, folder: Path, file: str
) -> None:
    content = (folder / file).read_bytes()
    for offset in [*range(0, len(content), 5), len(content) - 1]:
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        (folder / file).write_bytes(flipped)

        with pytest.raises(CheckpointDamaged, match=f"`{file}` of checkpoint `{PATH}@1`") as caught:
            store.open(PATH, tenant="t")

        assert caught.value.metadata["file"] == file


@pytest.mark.parametrize("file", FILES)
def test_a_torn_file_is_found_and_named(store: CheckpointStore, folder: Path, file: str) -> None:
    content = (folder / file).read_bytes()
    torn = [content[:kept] for kept in [*range(0, len(content), 50), len(content) - 1]]
    zeros = [head + bytes(len(content) - len(head)) for head in torn]
    for damaged in [*torn, *zeros, content + b"\n", content * 2]:
        (folder / file).write_bytes(damaged)

        if damaged.rstrip() == content and file == "manifest.json":
            assert store.open(PATH, tenant="t").manifest.step == 3  # JSON, and all of it
            continue
        with pytest.raises(CheckpointDamaged, match=f"`{file}` of checkpoint"):
            store.open(PATH, tenant="t")


@pytest.mark.parametrize("file", FILES[:3])
def test_a_missing_file_is_found_and_named(store: CheckpointStore, folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointDamaged, match=f"`{file}` of checkpoint .* is missing"):
        store.open(PATH, tenant="t")


def test_a_damaged_newest_revision_is_not_passed_over(
    store: CheckpointStore, publish: Publish, folder: Path
) -> None:
    publish("s", kind="weights")
    (folder.parent / "2/manifest.json").write_text("{}")

    with pytest.raises(CheckpointDamaged, match=r"`manifest.json` of checkpoint .*@2"):
        store.open(PATH, tenant="t")
    assert store.open(f"{PATH}@1", tenant="t").manifest.revision == 1


def test_a_folder_moved_elsewhere_is_not_accepted(store: CheckpointStore, folder: Path) -> None:
    other = folder.parent.parent / "other"
    other.mkdir()
    folder.rename(other / "1")
    with pytest.raises(CheckpointDamaged, match="is that of `mint://r-1/weights/s@1`"):
        store.open("mint://r-1/weights/other", tenant="t")


def test_a_manifest_of_a_later_format_is_refused(store: CheckpointStore, folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    del content["manifest_sha256"]
    content["format_version"] = 2
    from checkpoint_store.manifest import digest_of

    (folder / "manifest.json").write_text(
        json.dumps(content | {"manifest_sha256": digest_of(content)})
    )
    with pytest.raises(CheckpointDamaged, match="has format version 2 where 1 is read here"):
        store.open(PATH, tenant="t")


def test_weights_that_are_not_finite_do_not_open(store: CheckpointStore, folder: Path) -> None:
    weights = dict(adapter()["weights"])
    weights[lora_a_name("lm_head")][1, 2] = np.nan
    replace_weights(folder, weights)

    opened = store.open(PATH, tenant="t")

    with pytest.raises(WeightsNotFinite, match=r"lm_head.lora_A.weight"):
        opened.weights()


def replace_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """As a writer that checks nothing would have written them."""
    import hashlib
    from dataclasses import replace

    file = folder / "adapter_model.safetensors"
    save_file(weights, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = decode_manifest((folder / "manifest.json").read_bytes())
    files = dict(manifest.files) | {file.name: FileEntry(file.stat().st_size, digest)}
    (folder / "manifest.json").write_bytes(encode_manifest(replace(manifest, files=files)))


def test_deleted_between_open_and_read_is_not_found(store: CheckpointStore, folder: Path) -> None:
    opened = store.open(PATH, tenant="t")
    store.delete(PATH, tenant="t")
    with pytest.raises(CheckpointNotFound):
        opened.weights()


# Publishes one revision and dies, as by SIGKILL, when it is about to open, make, rename or remove
# something in the store for the n-th time.
_DYING_WRITER = """
import os, sys
from pathlib import Path
root, limit = Path(sys.argv[1]), int(sys.argv[2])
from checkpoint_store import CheckpointStore
from tests.checkpoint_files import publish_checkpoint
from tests.unit.checkpoint_store.conftest import SPEC, adapter
seen = 0
def count(event, arguments):
    global seen
    writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
        event == "open" and isinstance(arguments[0], (str, os.PathLike))
        and str(arguments[0]).startswith(str(root))
    )
    if writes:
        seen += 1
        if seen == limit:
            os.kill(os.getpid(), 9)
sys.addaudithook(count)
publish_checkpoint(
    CheckpointStore(root), training_run_id="r-1", kind="weights", name="s", tenant="t",
    base_model="b", base_fingerprint="f", spec=SPEC, step=2, **adapter(seed=2),
)
print("published")
"""


def test_a_writer_killed_at_any_moment_leaves_all_or_nothing(
    store: CheckpointStore, publish: Publish, tmp_path: Path
) -> None:
    publish("s", kind="weights", step=1, **adapter(seed=1))
    outcomes = []
    for limit in range(1, 40):
        finished = _run_dying_writer(tmp_path / "store", limit)
        steps = [m.step for m in store.list(tenant="t")]
        newest = store.open(PATH, tenant="t")  # verifies every file
        expected = adapter(seed=newest.manifest.step)["weights"]
        read = newest.weights()
        assert all(np.array_equal(read[name], expected[name]) for name in expected)
        assert steps == [newest.manifest.step]
        outcomes.append(newest.manifest.step)
        if finished:
            break

    assert finished
    assert outcomes[-1] == 2
    assert outcomes.count(1) > 5  # killed before the rename: the old revision stays
    assert outcomes == sorted(outcomes)


def _run_dying_writer(root: Path, limit: int) -> bool:
    """Whether it lived to the end."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_DYING_WRITER), str(root), str(limit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode in (0, -9), done.stderr
    return "published" in done.stdout

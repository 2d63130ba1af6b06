"""What is read from the store is not trusted: whoever can write there moves nothing out of it, and
stops nobody.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from checkpoint_store import CheckpointDamaged, CheckpointStore, SnapshotMemory, parse_path
from mint_core.errors import CheckpointNotFound, MintError
from tests.unit.checkpoint_store.conftest import Publish
from tests.unit.checkpoint_store.rows import remember, snapshot

LATER = timedelta(days=30)


@pytest.fixture
def bad(store: CheckpointStore, publish: Publish) -> Path:
    """The folder of a revision beside others, of this tenant and another."""
    publish("good")
    publish("other", training_run_id="r-2", tenant="other")
    return store.open(publish("bad"), tenant="t").folder


def rewrite(folder: Path, **changes: object) -> None:
    """As somebody would who knows how manifests are signed."""
    content = json.loads((folder / "manifest.json").read_text()) | changes
    del content["manifest_sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"manifest_sha256": digest}))


def names(store: CheckpointStore) -> list[str]:
    return sorted(manifest.name for manifest in store.list(tenant="t"))


ENTRY = {"size_bytes": 1, "sha256": "0" * 64}
SPEC = {"rank": 4, "alpha": 32.0, "use_rslora": False, "seed": 7, "modules": ["lm_head"]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("files", {name: ENTRY}) for name in ("../../x", "/etc/passwd", "a/b", "..", "", "\0")),
        *(("files", value) for value in ([], {"a": {}}, {"a": ENTRY | {"size_bytes": -1}})),
        *(("files", {"a": ENTRY | {"sha256": value}}) for value in ("0", 7, "../" * 21 + "0")),
        ("files", {"a": ENTRY | {"size_bytes": 2**63}}),
        *(("files_folder", value) for value in ("..", "../r-2", 7)),
        *(("create_time", value) for value in ("2026-11-29", "soon", 7, "9999-01-01T00:00+00:00")),
        *(("expire_time", value) for value in ("2026-11-29T00:00:00", "never", 7, True)),
        *((name, value) for name in ("step", "sequence") for value in ("1", -1, 2**63, 1.5, None)),
        *((name, value) for name in ("tenant", "source", "request", "mark") for value in (7, [])),
        *((name, "\ud800") for name in ("tenant", "base_model", "base_fingerprint")),
        *(("metadata", value) for value in ([], {"a": 1}, {"a": None}, {"a": "\ud800"})),
        *(("unused_limit_s", value) for value in (-1, "1", 1.5)),
        *(("head_untied", value) for value in (1, "no")),
        *(("kind", value) for value in ("other", [], None)),
        *(("name", value) for value in ("../bad", "", 7)),
        *(("revision", value) for value in (True, "1", 2)),
        *(("adapter", SPEC | {name: None}) for name in SPEC),
        ("adapter", SPEC | {"alpha": float("nan")}),
        ("adapter", []),
    ],
)
def test_a_manifest_with_nonsense_is_passed_over_and_refused_by_name(
    store: CheckpointStore, bad: Path, field: str, value: Any
) -> None:
    rewrite(bad, **{field: value})

    assert names(store) == ["good"]
    assert store.sweep(now=datetime.now(UTC) + LATER).removed == 0
    with pytest.raises((CheckpointDamaged, CheckpointNotFound), match="mint://r-1/sampler_weights"):
        store.copy("mint://r-1/sampler_weights/bad", "copy", tenant="t")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{" * 5, b"\xff", b"9" * 5000, b"0" * 2**23])
def test_a_file_that_is_no_manifest_is_passed_over(
    store: CheckpointStore, bad: Path, content: bytes
) -> None:
    (bad / "manifest.json").write_bytes(content)

    assert names(store) == ["good"]
    with pytest.raises(CheckpointDamaged, match=r"`manifest.json` of checkpoint"):
        store.find("mint://r-1/sampler_weights/bad", tenant="t")


def pipe(file: Path, outside: Path) -> None:
    os.mkfifo(file)


def listening(file: Path, outside: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(file.name)
    os.chdir(here)


def link(file: Path, outside: Path) -> None:
    file.symlink_to(outside)


@pytest.mark.parametrize("put", [pipe, listening, link])
@pytest.mark.parametrize("file", ["manifest.json", "adapter_model.safetensors", "deleted"])
def test_what_is_no_regular_file_is_refused_and_holds_nobody(
    store: CheckpointStore,
    bad: Path,
    tmp_path: Path,
    file: str,
    put: Callable[[Path, Path], None],
) -> None:
    there = (bad / file).exists()
    outside = tmp_path / "outside"
    outside.write_bytes((bad / file).read_bytes() if there else b"secret")
    (bad / file).unlink(missing_ok=True)
    put(bad / file, outside)
    path = "mint://r-1/sampler_weights/bad"

    assert "good" in names(store)
    if there:
        with pytest.raises(CheckpointDamaged, match=rf"`{file}` of checkpoint .* cannot be read"):
            store.open(path, tenant="t")
        with pytest.raises(CheckpointDamaged, match="cannot be read"):
            store.copy(path, "copy", tenant="t")
    store.sweep(now=datetime.now(UTC) + LATER)
    if file != "manifest.json":
        store.delete(path, tenant="t", request="asked")
        assert names(store) == ["good"]
    assert outside.exists()


def test_a_pipe_in_the_place_of_an_announcement_holds_nobody(
    store: CheckpointStore, tmp_path: Path
) -> None:
    coming = snapshot()
    store.announce(coming)
    file = tmp_path / "store/r-1/sampler_weights" / coming.name / "announced"
    assert store.announced(str(coming.path), tenant="t")
    file.unlink()
    os.mkfifo(file)

    assert not store.announced(str(coming.path), tenant="t")


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_folder_that_is_a_link_is_not_followed(
    store: CheckpointStore, bad: Path, tmp_path: Path, depth: int
) -> None:
    folder = bad.parents[depth - 2] if depth > 1 else bad
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")

    restarted = CheckpointStore(tmp_path / "store")
    assert "bad" not in names(restarted)
    assert not restarted.list(tenant="t", training_run_id="r-1") or depth < 4
    with pytest.raises(CheckpointDamaged, match="is a link, which may lead out of the store"):
        store.open("mint://r-1/sampler_weights/bad@1", tenant="t")


def test_a_folder_in_a_revision_does_not_keep_it(store: CheckpointStore, bad: Path) -> None:
    (bad / "folder").mkdir()
    (bad / "folder/file").touch()

    store.delete("mint://r-1/sampler_weights/bad", tenant="t")

    assert [file.name for file in bad.iterdir()] == ["deleted"]


def refusal(store: CheckpointStore, path: str, tenant: str) -> tuple[str, str]:
    with pytest.raises(MintError) as caught:
        store.find(path, tenant=tenant)
    return caught.value.reason, caught.value.message.replace(path, "PATH")


def test_nobody_learns_what_another_tenant_has(
    store: CheckpointStore, bad: Path, tmp_path: Path
) -> None:
    memory = SnapshotMemory(tmp_path / "memory")
    beside = CheckpointStore(tmp_path / "store", tmp_path / "memory")
    remembered = remember(memory, snapshot())
    (bad / "manifest.json").write_bytes(b"damaged")
    theirs = [
        f"mint://r-1/{kind}/{name}"
        for kind in ("weights", "sampler_weights", "merged_weights")
        for name in (remembered.name, "good", "bad")
    ]
    nothing = refusal(beside, "mint://r-1/weights/never", "other")

    assert {refusal(beside, path, "other") for path in theirs} == {nothing}
    with pytest.raises(CheckpointNotFound):
        beside.delete("mint://r-1/sampler_weights/bad", tenant="other")
    assert beside.find(theirs[3], tenant="t").row is not None
    assert not beside.has(parse_path("mint://r-1/weights/never"))
    memory.close()

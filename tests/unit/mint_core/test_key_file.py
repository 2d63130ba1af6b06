"""What a line of a key file says."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mint_core.access.key_file import USUAL, Key, add_key, read_keys, remove_key
from mint_core.access.key_ring import KeyRing
from mint_core.access.scopes import allows, changes, scope_of
from mint_core.errors import FailedPrecondition, NotFound, Unauthenticated

HASH = "0" * 64
END = datetime(2030, 1, 31, tzinfo=UTC)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"weight": 2.5},
        {"scopes": frozenset({"read"})},
        {"scopes": frozenset({"admin", "train"}), "expires": END, "comment": "ann's laptop"},
        {"expires": END, "weight": 0.5, "comment": "a # b = c"},
    ],
)
def test_what_is_written_is_read(tmp_path: Path, fields: dict[str, Any]) -> None:
    _, key = add_key(tmp_path / "keys", "ann", **fields)

    assert read_keys(tmp_path / "keys") == {key.digest: key}
    assert all(getattr(key, name) == value for name, value in fields.items())


def test_a_line_of_earlier_versions_may_all_but_administer(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n{HASH} ann 2\n")

    assert list(read_keys(tmp_path / "keys").values()) == [
        Key(digest=HASH, tenant="ann", weight=2.0, scopes=USUAL)
    ]


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        ("ann scopes=train,cook", "take some of train, sample, read, admin"),
        ("ann scopes=", "take some of train"),
        ("ann expires=soon", "Invalid isoformat string"),
        ("ann expires=9999-12-31T23:59-05:00", "beyond the years"),
        ("ann scopes=read scopes=train", "`scopes` is there twice"),
        ("ann colour=red", "'colour=red' means nothing here"),
        ("ann 2 3", "`weight` is there twice"),
        ("ann 1000", "'1000' means nothing here"),
        ("ann 0", "must be 0.01 to 100"),
        ("", "cannot be a name"),
    ],
)
def test_a_bad_word_is_named(tmp_path: Path, rest: str, why: str) -> None:
    (tmp_path / "keys").write_text(f"{HASH} {rest}\n")
    with pytest.raises(FailedPrecondition, match=r"bad line 1 \(.*" + why):
        read_keys(tmp_path / "keys")


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Whose it is would be the last line's word."""
    (tmp_path / "keys").write_text(f"{HASH} ann\n{HASH} bob scopes=admin\n")
    with pytest.raises(FailedPrecondition, match="has a key twice, again in line 2"):
        read_keys(tmp_path / "keys")


def test_a_pipe_in_the_place_of_the_file_holds_nobody(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secret, key = add_key(file, "ann")
    ring = KeyRing(file)
    file.unlink()
    os.mkfifo(file)

    assert ring.find(secret) == key
    with pytest.raises(FailedPrecondition, match="cannot be read: it is no regular file"):
        read_keys(file)


def test_a_key_that_is_revoked_leaves_the_others_as_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first, _ = add_key(file, "ann", comment="old")
    second, key = add_key(file, "ann", comment="new")  # both are good while one replaces the other
    file.write_text("# ours\n\n" + file.read_text())
    ring = KeyRing(file)
    assert {ring.find(secret).tenant for secret in (first, second)} == {"ann"}

    old = ring.find(first)
    assert remove_key(file, old.id) == old
    assert file.read_text() == f"# ours\n\n{key.line()}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Unauthenticated):
        ring.find(first)
    assert ring.find(second) == key
    with pytest.raises(NotFound, match="no key `" + old.id):
        remove_key(file, old.id)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_second_weight_of_a_tenant_is_refused_before_it_is_written(
    tmp_path: Path, weight: float
) -> None:
    file = tmp_path / "keys"
    add_key(file, "ann", weight=weight)
    before = file.read_text()
    with pytest.raises(FailedPrecondition, match=f"`weight` of tenant ann is {weight:g}"):
        add_key(file, "ann", weight=3.0)
    assert file.read_text() == before
    add_key(file, "ann", weight=weight)
    add_key(file, "ann")
    add_key(file, "bob", weight=3.0)
    assert len(read_keys(file)) == 4


def test_a_key_ends(tmp_path: Path) -> None:
    late = datetime.now(UTC) + timedelta(hours=1)
    good, _ = add_key(tmp_path / "keys", "ann", expires=late)
    bad, key = add_key(tmp_path / "keys", "ann", expires=END - timedelta(days=10_000))
    ring = KeyRing(tmp_path / "keys")

    assert ring.find(good).expires == late
    with pytest.raises(Unauthenticated, match=f"the API key {key.id} expired on"):
        ring.find(bad)


def test_a_comment_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="`comment` is more than one line"):
        add_key(tmp_path / "keys", "ann", comment=f"x\n{HASH} eve scopes=admin")
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize(
    ("method", "scope", "recorded"),
    [
        ("/mintrpc.v1.TrainerService/ForwardBackward", "train", True),
        ("/mintrpc.v1.TrainerService/Forward", "train", False),
        ("/mintrpc.v1.TrainerService/GetTrainingRun", "read", False),
        ("/mintrpc.v1.TrainerService/WatchTrainingRun", "read", False),
        ("/mintrpc.v1.CheckpointService/ListCheckpoints", "read", False),
        ("/mintrpc.v1.CheckpointService/GetCheckpoint", "fetch", False),
        ("/mintrpc.v1.CheckpointService/DownloadCheckpoint", "fetch", False),
        ("/mintrpc.v1.CheckpointService/DeleteCheckpoint", "train", True),
        ("/mintrpc.v1.SamplerService/Sample", "sample", False),
        ("/mintrpc.v1.ModelService/GetServerCapabilities", None, False),
        ("/mintrpc.v1.AdminService/ListKeys", "admin", False),
        ("/mintrpc.v1.AdminService/RevokeKey", "admin", True),
        ("/mintrpc.v1.NewService/Do", "admin", True),
    ],
)
def test_each_call_takes_a_scope(method: str, scope: str | None, recorded: bool) -> None:
    assert scope_of(method) == scope
    assert changes(method) == recorded
    for held, enough in {
        "train": ("train", "read", "fetch", None),
        "read": ("read", "fetch", None),
        "fetch": ("fetch", None),
    }.items():
        assert allows(frozenset({held}), scope) == (scope in enough)  # type: ignore[arg-type]

"""Key files and who a key belongs to."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mint_core.errors import FailedPrecondition, Unauthenticated
from mint_core.rpc.access import KeyRing
from tests.keys import make_key


def test_a_new_key_opens_its_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    alice, bob = make_key("alice", file), make_key("bob", file)
    ring = KeyRing(file)

    assert ring.find(alice).tenant == "alice"
    assert ring.find(bob).tenant == "bob"
    assert alice.startswith("sk-mint-")


def test_the_file_holds_hashes_and_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = make_key("alice", file)

    assert file.read_text() == f"{hashlib.sha256(key.encode()).hexdigest()} alice\n"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_line_is_added_after_one_without_an_end(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first = make_key("alice", file)
    file.write_text("# ours\n\n" + file.read_text().rstrip("\n"))
    second = make_key("bob", file)
    ring = KeyRing(file)

    assert [ring.find(first).tenant, ring.find(second).tenant] == ["alice", "bob"]


@pytest.mark.parametrize("key", [None, ""])
def test_no_key_is_refused(tmp_path: Path, key: str | None) -> None:
    make_key("alice", tmp_path / "keys")
    with pytest.raises(Unauthenticated, match="no API key"):
        KeyRing(tmp_path / "keys").find(key)


def test_a_wrong_key_is_refused_and_not_repeated(tmp_path: Path) -> None:
    key = make_key("alice", tmp_path / "keys")
    with pytest.raises(Unauthenticated) as caught:
        KeyRing(tmp_path / "keys").find(key[:-1])

    assert key[:-1] not in str(caught.value)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    alice = make_key("alice", file)
    ring = KeyRing(file)
    bob = make_key("bob", file)
    assert ring.find(bob).tenant == "bob"

    file.write_text(file.read_text().splitlines()[1] + "\n")
    with pytest.raises(Unauthenticated):
        ring.find(alice)
    assert ring.find(bob).tenant == "bob"


def test_a_broken_or_missing_file_keeps_the_keys_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    alice = make_key("alice", file)
    ring = KeyRing(file)
    file.write_text("half a li")
    assert ring.find(alice).tenant == "alice"
    assert ring.find(alice).tenant == "alice"
    assert caplog.text.count("bad line 1") == 1

    file.unlink()
    assert ring.find(alice).tenant == "alice"
    assert caplog.text.count("cannot be read") == 1

    bob = make_key("bob", file)
    assert ring.find(bob).tenant == "bob"


@pytest.mark.parametrize(
    "text",
    [
        "abc alice",
        "0" * 64,
        "0" * 64 + " al/ice",
        "G" * 64 + " alice",
        *("0" * 64 + f" alice {weight}" for weight in ("x", "0", "-1", "nan", "1e1", "101", "1 1")),
    ],
)
def test_a_bad_line_is_named_at_start(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{text}\n")
    with pytest.raises(FailedPrecondition, match=r"bad line 2 \(.*\); a line is"):
        KeyRing(file)


def test_a_number_after_the_tenant_is_its_weight(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys = [make_key(tenant, file) for tenant in ("alice", "alice", "bob")]
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1] + " 2.5", lines[2]]))
    ring = KeyRing(file)

    assert [ring.find(key).tenant for key in keys] == ["alice", "alice", "bob"]
    assert [ring.weight_of(tenant) for tenant in ("alice", "bob", "nobody")] == [2.5, 1, 1]

    make_key("alice", file)  # the weight stays, and the file is read again
    file.write_text(file.read_text().replace(" 2.5", " 0.5"))
    assert ring.find(keys[0]).tenant == "alice"
    assert ring.weight_of("alice") == 0.5


def test_two_weights_of_a_tenant_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{'0' * 64} alice 2\n{'1' * 64} alice 2\n")
    assert KeyRing(file).weight_of("alice") == 2

    file.write_text(f"{'0' * 64} alice 2\n{'1' * 64} alice 3\n")
    with pytest.raises(FailedPrecondition, match="tenant alice another weight in line 2"):
        KeyRing(file)


def test_a_missing_file_is_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=re.escape(f"{tmp_path / 'none'} cannot be read")):
        KeyRing(tmp_path / "none")


@pytest.mark.parametrize("tenant", ["", "a b", "../x", "-x", "a" * 65, "a\n"])
def test_a_tenant_must_be_a_plain_name(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(FailedPrecondition, match="cannot be a name"):
        make_key(tenant, tmp_path / "keys")


def test_the_command_prints_the_key_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    command = [sys.executable, "-m", "mint_core.rpc.access", "alice", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))

    assert done.returncode == 0
    assert KeyRing(file).find(done.stdout.removesuffix("\n")).tenant == "alice"


@pytest.mark.parametrize(
    "arguments", [["alice"], ["a b", "keys"], ["alice", "no/such/folder/keys"]]
)
def test_a_wrong_command_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "mint_core.rpc.access", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )

    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")

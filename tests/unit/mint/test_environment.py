"""Variables, `.env`, forms of addresses, and what an import costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mint
from mint._transport.address import Address, parse_address
from mint._transport.opening import read_environment
from tests.unit.mint.faulty_server import Server


def test_nothing_set_means_loopback() -> None:
    """Requirement 6."""
    service = mint.ServiceClient(base_url=None, timeout=None)

    assert service._servers.trainer.address == Address("127.0.0.1", 50051, tls=False)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("host:1234", Address("host", 1234, tls=False)),
        ("host", Address("host", 50051, tls=False)),
        ("http://host:1234/", Address("host", 1234, tls=False)),
        ("http://10.0.0.1", Address("10.0.0.1", 50051, tls=False)),
        ("https://host", Address("host", 443, tls=True)),
        ("https://host:8443/", Address("host", 8443, tls=True)),
        ("[::1]:7", Address("::1", 7, tls=False)),
    ],
)
def test_forms_of_base_url(url: str, address: Address) -> None:
    assert parse_address(url, "base_url") == address


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "http://host/train", "http://", ":50051", "host:port", "host:99999", "a@b:1"],
)
def test_other_forms_are_refused(url: str) -> None:
    with pytest.raises(mint.BadRequestError, match="base_url") as caught:
        mint.ServiceClient(base_url=url)

    assert caught.value.field == "base_url"


def test_the_environment_is_read_at_construction(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINT_BASE_URL", f"http://{server.address}/")
    monkeypatch.setenv("MINT_API_KEY", "sk-environment")
    monkeypatch.setenv("MINT_BASE_MODEL", "base")
    monkeypatch.setenv("MINT_LORA_RANK", "8")
    with mint.ServiceClient() as service:
        training = service.create_lora_training_client()

    assert training.training_run.lora_rank == 8
    assert training.training_run.base_model == "base"
    assert server.model.metadata[-1]["authorization"] == "Bearer sk-environment"


def test_arguments_beat_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_BASE_URL", "nowhere:1")
    monkeypatch.setenv("MINT_LORA_RANK", "8")
    with mint.ServiceClient(base_url=server.address, user_metadata={"a": "1", "b": "1"}) as service:
        training = service.create_lora_training_client("base", 4, user_metadata={"b": "2"})

    assert training.training_run.lora_rank == 4
    assert training.training_run.metadata == {"a": "1", "b": "2"}


def test_dotenv_fills_what_the_environment_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("MINT_BASE_MODEL=from-file\nMINT_API_KEY='sk-file'\n")
    below = tmp_path / "scripts"
    below.mkdir()
    monkeypatch.chdir(below)
    monkeypatch.setenv("MINT_API_KEY", "sk-environment")
    before = dict(os.environ)

    environment = read_environment()

    assert environment["MINT_BASE_MODEL"] == "from-file"
    assert environment["MINT_API_KEY"] == "sk-environment"
    assert environment["MINT_LORA_RANK"] == "16"
    assert dict(os.environ) == before


def test_another_users_dotenv_is_refused_until_one_lies_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that others may write into, such as /tmp, it could send a key anywhere."""
    (tmp_path / ".env").write_text("MINT_BASE_URL=elsewhere:1\n")
    below = tmp_path / "scripts"
    below.mkdir()
    monkeypatch.chdir(below)
    if os.getuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    os.chown(tmp_path / ".env", 4321, -1)

    with pytest.raises(mint.InvalidInputError, match=r"\.env` belongs to another user"):
        mint.ServiceClient()

    (below / ".env").touch()
    assert not read_environment()["MINT_BASE_URL"]
    (below / ".env").unlink()
    os.chown(below, 4321, -1)  # a folder of his, in which this user has chosen to run
    assert read_environment()["MINT_BASE_URL"] == "elsewhere:1"


@pytest.mark.parametrize("rank", ["0", "eight", "-4", "1.5"])
def test_a_rank_that_is_no_number_is_refused(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_LORA_RANK", rank)

    with pytest.raises(mint.BadRequestError, match="MINT_LORA_RANK"):
        mint.ServiceClient()


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "soon"])
def test_a_timeout_must_be_positive(timeout: float) -> None:
    with pytest.raises(mint.BadRequestError, match="timeout"):
        mint.ServiceClient(timeout=timeout)


IMPORT = """
import sys, threading
import mint, mint.types
mint.types.Datum(mint.types.ModelInput.from_ints([1]), {"weights": [1]})
mint.ServiceClient()
assert not {"torch", "transformers", "jinja2"} & set(sys.modules), "too much was imported"
assert threading.active_count() == 1, threading.enumerate()
"""


def test_importing_needs_no_torch_no_transformers_and_starts_no_thread() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True, timeout=60)

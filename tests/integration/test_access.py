"""Keys and tenants: who may call, and what a tenant sees."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mint
from tests.servers import running_summing_trainer


def new_key(tenant: str, keys: Path) -> str:
    """As `make key` does."""
    command = [sys.executable, "-m", "mint_core.access.key_ring", tenant, str(keys)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return next(word for word in done.stdout.split() if word.startswith("sk-mint-"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A trainer that demands keys, and the keys of two tenants."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = {tenant: new_key(tenant, folder / "keys") for tenant in ("ada", "bob", "cid", "dan")}
    (folder / "quotas").write_text("[tenant.cid]\nruns = 1\n[tenant.dan]\nrow_gib = 0\n")
    with running_summing_trainer(folder, keys=folder / "keys", quotas=folder / "quotas") as trainer:
        yield trainer.address, keys


@pytest.mark.parametrize("key", [None, "sk-mint-wrong"])
def test_a_missing_or_wrong_key_is_refused_with_a_remedy(
    guarded: tuple[str, dict[str, str]], key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requirement 5."""
    monkeypatch.delenv("MINT_API_KEY", raising=False)
    with (
        mint.ServiceClient(base_url=guarded[0], api_key=key) as client,
        pytest.raises(mint.AuthenticationError, match="key") as caught,
    ):
        client.get_server_capabilities()
    assert caught.value.status_code == 401
    assert "wrong" not in str(caught.value)  # keys never appear in errors
    assert str(caught.value).count("MINT_API_KEY") == 1


def test_the_key_of_the_environment_opens_the_door(
    guarded: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requirement 5."""
    monkeypatch.setenv("MINT_API_KEY", guarded[1]["ada"])
    with mint.ServiceClient(base_url=guarded[0]) as client:
        assert client.create_lora_training_client(rank=1).training_run_id


def test_another_tenants_run_is_not_found(guarded: tuple[str, dict[str, str]]) -> None:
    address, keys = guarded
    with (
        mint.ServiceClient(base_url=address, api_key=keys["ada"]) as ada,
        mint.ServiceClient(base_url=address, api_key=keys["bob"]) as bob,
    ):
        run = ada.create_lora_training_client(rank=1)
        path = run.save_state("mine").result().path
        with pytest.raises(mint.NotFoundError) as caught:
            bob.open_training_run(run.training_run_id)
        assert caught.value.reason == "TRAINING_RUN_NOT_FOUND"
        with pytest.raises(mint.NotFoundError) as caught:
            bob.create_training_client_from_state(path)
        assert caught.value.reason == "CHECKPOINT_NOT_FOUND"
        assert ada.get_training_run(run.training_run_id).training_run_id == run.training_run_id


def test_a_tenant_has_as_many_runs_as_its_quota_says(guarded: tuple[str, dict[str, str]]) -> None:
    address, keys = guarded
    with mint.ServiceClient(base_url=address, api_key=keys["cid"]) as client:
        run = client.create_lora_training_client(rank=1)
        with pytest.raises(mint.RateLimitError, match="`runs` of this server allows 1") as caught:
            client.create_lora_training_client(rank=1)
        assert caught.value.reason == "QUOTA_EXCEEDED"
        client.delete_training_run(run.training_run_id)
        client.create_lora_training_client(rank=1)
    with mint.ServiceClient(base_url=address, api_key=keys["ada"]) as other:
        other.create_lora_training_client(rank=1)


def test_a_tenants_rows_are_as_large_as_its_quota_says(
    guarded: tuple[str, dict[str, str]],
) -> None:
    address, keys = guarded
    with mint.ServiceClient(base_url=address, api_key=keys["dan"]) as client:
        run = client.create_lora_training_client(rank=1)  # one is never too large
        with pytest.raises(mint.RateLimitError, match="`row_gib` of this server") as caught:
            client.create_lora_training_client(rank=1)
        assert caught.value.reason == "QUOTA_EXCEEDED"
        client.delete_training_run(run.training_run_id)
        client.create_lora_training_client(rank=1)

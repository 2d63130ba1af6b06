"""A client beside a server that fails as told, away from the environment of who runs the tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import mint
from mint import types
from tests.unit.mint.faulty_server import Server, running


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("BASE_URL", "API_KEY", "BASE_MODEL", "LORA_RANK", "SAMPLER_URL"):
        monkeypatch.delenv(f"MINT_{name}", raising=False)
    monkeypatch.chdir(tmp_path)  # no `.env` of a developer's
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as one:
        yield one


@pytest.fixture
def service(server: Server) -> Iterator[mint.ServiceClient]:
    with mint.ServiceClient(base_url=server.address) as client:
        yield client


@pytest.fixture
def training(service: mint.ServiceClient) -> mint.TrainingClient:
    return service.create_lora_training_client()


@pytest.fixture
def sampling(service: mint.ServiceClient) -> mint.SamplingClient:
    return service.create_sampling_client()


@pytest.fixture
def data() -> list[types.Datum]:
    prompt = types.ModelInput.from_ints([1, 2])
    return [types.Datum(prompt, {"target_tokens": [2, 3], "weights": [0, 1]})]

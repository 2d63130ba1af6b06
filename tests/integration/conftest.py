"""A real trainer, called over the bare stubs; and servers without an engine."""

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from mintrpc.v1 import trainer_pb2_grpc
from tests.hosted import Served, serving
from tests.keys import make_key
from tests.servers import RunningService, running_trainer
from tests.trainer_rpc import RawRun, create

GAP_S = 1.5  # early arrivals are held shorter than usual, so that tests need not wait


@pytest.fixture(scope="session")
def trainer_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer-store")


@pytest.fixture(scope="session")
def trainer(qwen3_folder: Path, trainer_store: Path) -> Iterator[RunningService]:
    """Shared by tests that leave its engine alone."""
    with running_trainer(
        qwen3_folder, trainer_store, base_model_name="tiny", gap_s=GAP_S, max_batch_tokens=256
    ) as service:
        yield service


@dataclass(frozen=True, slots=True)
class KeyedTrainer:
    """A trainer of another base model on the same store, which asks for keys."""

    service: RunningService
    stub: trainer_pb2_grpc.TrainerServiceStub
    keys: Mapping[str, str]  # by tenant

    def options(self, tenant: str) -> dict[str, Any]:
        """What a call of a tenant's carries."""
        return {"metadata": [("authorization", f"Bearer {self.keys[tenant]}")]}


@pytest.fixture(scope="session")
def keyed_trainer(
    llama_folder: Path, trainer_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeyedTrainer]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    keys = {tenant: make_key(tenant, file) for tenant in ("ann", "bob", "default")}
    with (
        running_trainer(
            llama_folder, trainer_store, keys=file, state=file.with_name("state")
        ) as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        yield KeyedTrainer(service, trainer_pb2_grpc.TrainerServiceStub(channel), keys)


@pytest.fixture(scope="session")
def trainer_stub(trainer: RunningService) -> Iterator[trainer_pb2_grpc.TrainerServiceStub]:
    with grpc.insecure_channel(trainer.address) as channel:
        yield trainer_pb2_grpc.TrainerServiceStub(channel)


@pytest.fixture
def run(trainer_stub: trainer_pb2_grpc.TrainerServiceStub) -> RawRun:
    """A new run of rank 4."""
    return create(trainer_stub)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as host:
        yield host


@pytest.fixture
def call_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="mint.calls"):
        yield caplog

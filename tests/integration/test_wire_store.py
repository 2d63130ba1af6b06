"""Trainer and sampler on two hosts that share nothing: adapters go over the wire."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc, trainer_pb2_grpc, types_pb2
from tests.keys import make_key
from tests.samplers import DEADLINE_S, Sampler, connected, refusal, tokens_of
from tests.servers import RunningService, running_sampler, running_trainer
from tests.trainer_rpc import RawRun, create, datum

ADAM = types_pb2.AdamParams(learning_rate=0.05)
Code = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class TrainerHost:
    """Its own folder and memory, and keys for two tenants and a sampler."""

    root: Path
    service: RunningService
    stub: trainer_pb2_grpc.TrainerServiceStub
    checkpoints: checkpoint_pb2_grpc.CheckpointServiceStub
    keys: dict[str, str]

    def options(self, tenant: str = "ada") -> dict[str, Any]:
        return {"metadata": [("authorization", f"Bearer {self.keys[tenant]}")]}

    def run(self, tenant: str = "ada") -> RawRun:
        run = create(self.stub, self.options(tenant))
        step(run)
        return run


def step(run: RawRun) -> None:
    run.send(run.forward_backward(datum([5, 6, 7, 8, 9])))
    run.send(run.optim_step(adam_params=ADAM))


def publish(run: RawRun, name: str = "") -> str:
    return str(run.send(run.save_for_sampler(name)).revision_path)


@contextmanager
def training(model: Path, root: Path, **flags: object) -> Iterator[TrainerHost]:
    scopes = {"ada": {}, "bob": {}, "sampler": {"scopes": frozenset({"fetch"})}}
    keys = {name: make_key(name, root / "keys", **fields) for name, fields in scopes.items()}
    settings = {"base_model_name": "tiny", "keys": root / "keys", **flags}
    memory = {"snapshot_memory_folder": root / "memory"}
    with (
        running_trainer(model, root / "store", **memory, **settings) as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        yield TrainerHost(root, service, stub, checkpoints, keys)


@contextmanager
def sampling(
    model: Path, root: Path, host: TrainerHost, address: str = "", key: str = "", **flags: object
) -> Iterator[Sampler]:
    """A sampler of another host, as `ada` meets it."""
    root.mkdir(exist_ok=True)
    (root / "key").write_text((key or host.keys["sampler"]) + "\n")
    settings = {
        "base_model_name": "tiny",
        "local_folder": root,
        "keys": host.root / "keys",
        "store_api_key": root / "key",
        **flags,
    }
    with (
        running_sampler(model, address or f"http://{host.service.address}", **settings) as service,
        connected(service, root / "no store", host.keys["ada"]) as sampler,
    ):
        yield sampler


@pytest.fixture(scope="module")
def host(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerHost]:
    with training(qwen3_folder, tmp_path_factory.mktemp("trainer")) as host:
        yield host


@pytest.fixture(scope="module")
def away(
    qwen3_folder: Path, host: TrainerHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sampler]:
    with sampling(qwen3_folder, tmp_path_factory.mktemp("sampler"), host) as sampler:
        yield sampler


def test_it_samples_to_the_bit_what_samplers_of_the_shared_folder_do(
    host: TrainerHost, away: Sampler, qwen3_folder: Path
) -> None:
    flags = {"snapshot_memory_folder": host.root / "memory", "keys": host.root / "keys"}
    with (
        running_sampler(
            qwen3_folder, host.root / "store", base_model_name="tiny", **flags
        ) as service,
        connected(service, host.root / "store", host.keys["ada"]) as beside,
    ):
        run = host.run()
        seen = []
        for name in ("", "a", "a", ""):
            step(run)
            path = publish(run, name)
            for asked in {path, path.partition("@")[0]}:
                here, there = away.sample(model_path=asked), beside.sample(model_path=asked)
                assert here.sequences == there.sequences  # tokens, logprobs, the revision
                assert here.sequences[0].revision_path == path
            seen.append(str(tokens_of(here)))
        assert len(set(seen)) == 4


def test_a_tenants_adapter_is_its_own(host: TrainerHost, away: Sampler) -> None:
    path = publish(host.run("bob"), "b")
    assert refused(lambda: away.sample(model_path=path)) == (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
    with connected(away.service, host.root, host.keys["bob"]) as bob:
        assert tokens_of(bob.sample(model_path=path))
    assert refused(lambda: away.sample(model_path=path)) == (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND")


def test_what_is_deleted_is_not_found(host: TrainerHost, away: Sampler) -> None:
    path = publish(host.run(), "gone").partition("@")[0]
    assert tokens_of(away.sample(model_path=path))
    request = checkpoint_pb2.DeleteCheckpointRequest(path=path, request_id="d")
    host.checkpoints.DeleteCheckpoint(request, timeout=DEADLINE_S, **host.options())
    assert refused(lambda: away.sample(model_path=path)) == (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND")


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    code, _, info = refusal(call)
    return code, info.reason

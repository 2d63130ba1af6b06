"""Trainer and sampler on two hosts that share nothing: adapters go over the wire, by mTLS."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from checkpoint_store import CheckpointStore
from mintrpc.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    trainer_pb2_grpc,
    types_pb2,
)
from tests.authorities import Authority
from tests.harness.proxy import Proxy
from tests.keys import make_key
from tests.samplers import DEADLINE_S, Sampler, connected, refusal, sample_request, tokens_of
from tests.servers import RunningService, running_sampler, running_trainer
from tests.trainer_rpc import RawRun, create, datum

ADAM = types_pb2.AdamParams(learning_rate=0.05)
NOT_FOUND = grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND"


@dataclass(frozen=True, slots=True)
class TrainerHost:
    """Its own folder and memory, and keys for two tenants and a sampler."""

    root: Path
    ca: Authority
    service: RunningService
    channel: grpc.Channel
    keys: dict[str, str]

    @property
    def checkpoints(self) -> checkpoint_pb2_grpc.CheckpointServiceStub:
        return checkpoint_pb2_grpc.CheckpointServiceStub(self.channel)

    def options(self, tenant: str = "ada") -> dict[str, Any]:
        return {"metadata": [("authorization", f"Bearer {self.keys[tenant]}")]}

    def run(self, tenant: str = "ada") -> RawRun:
        stub = trainer_pb2_grpc.TrainerServiceStub(self.channel)
        run = create(stub, self.options(tenant))
        step(run)
        return run


class Wire(Proxy):
    """Between the hosts; nobody is there while it is `away`."""

    away = False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.away:
            writer.transport.abort()
        else:
            await super()._connected(reader, writer)


@dataclass(frozen=True, slots=True)
class Away:
    """A sampler of another host."""

    sampler: Sampler
    wire: Wire


def step(run: RawRun) -> None:
    run.send(run.forward_backward(datum([5, 6, 7, 8, 9])))
    run.send(run.optim_step(adam_params=ADAM))


def publish(run: RawRun, name: str = "") -> str:
    return str(run.send(run.save_for_sampler(name)).revision_path)


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    code, _, info = refusal(call)
    return code, info.reason


@contextmanager
def calling(address: str, ca: Authority) -> Iterator[grpc.Channel]:
    cert, key = ca.issue("client")
    files = (ca.file.read_bytes(), key.read_bytes(), cert.read_bytes())
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(*files)) as channel:
        yield channel


@pytest.fixture(scope="module")
def host(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerHost]:
    root = tmp_path_factory.mktemp("trainer")
    ca = Authority(root / "certs")
    cert, tls_key = ca.issue("server", "127.0.0.1")
    keys = {tenant: make_key(tenant, root / "keys") for tenant in ("ada", "bob")}
    keys["sampler"] = make_key("sampler", root / "keys", scopes=frozenset({"fetch"}))
    flags = {
        "snapshot_memory_folder": root / "memory",
        "keys": root / "keys",
        "tls_cert": cert,
        "tls_key": tls_key,
        "client_ca": ca.file,
    }
    with (
        running_trainer(qwen3_folder, root / "store", base_model_name="tiny", **flags) as service,
        calling(service.address.removeprefix("https://"), ca) as channel,
    ):
        yield TrainerHost(root, ca, service, channel, keys)


@pytest.fixture(scope="module")
def away(
    qwen3_folder: Path, host: TrainerHost, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Away]:
    """It is started while there is no trainer."""
    root = tmp_path_factory.mktemp("sampler")
    (root / "key").write_text(host.keys["sampler"] + "\n")
    cert, key = host.ca.issue("sampler")
    wire = Wire(host.service.address.removeprefix("https://"))
    wire.away = True
    flags = {
        "local_folder": root,
        "keys": host.root / "keys",
        "store_api_key": root / "key",
        "store_tls_ca": host.ca.file,
        "store_tls_cert": cert,
        "store_tls_key": key,
    }
    store = f"https://{wire.address}"
    with (
        running_sampler(qwen3_folder, store, base_model_name="tiny", **flags) as service,
        connected(service, root / "none", host.keys["ada"]) as sampler,
    ):
        assert "does not answer" in service.log_text()
        wire.away = False
        yield Away(sampler, wire)
    wire.close()


def test_it_samples_to_the_bit_what_samplers_of_the_shared_folder_do(
    host: TrainerHost, away: Away, qwen3_folder: Path
) -> None:
    flags = {"snapshot_memory_folder": host.root / "memory", "keys": host.root / "keys"}
    store = host.root / "store"
    with (
        running_sampler(qwen3_folder, store, base_model_name="tiny", **flags) as service,
        connected(service, store, host.keys["ada"]) as beside,
    ):
        run = host.run()
        seen = []
        for name in ("", "a", "a", ""):
            step(run)
            path = publish(run, name)
            for asked in {path, path.partition("@")[0]}:
                here = away.sampler.sample(model_path=asked)
                there = beside.sample(model_path=asked)
                assert here.sequences == there.sequences  # tokens, logprobs, the revision
                assert here.sequences[0].revision_path == path
            seen.append(str(tokens_of(here)))
        assert len(set(seen)) == 4


def test_calls_that_come_together_share_one_download(host: TrainerHost, away: Away) -> None:
    path = publish(host.run(), "shared").partition("@")[0]
    before = host.service.log.read_text().count("method=DownloadCheckpoint")
    request = {"model_path": path, "num_samples": 1}
    stub, metadata = away.sampler.stub, away.sampler.metadata
    calls = [
        stub.Sample.future(sample_request(**request), timeout=DEADLINE_S, metadata=metadata)
        for _ in range(8)
    ]
    assert len({str(tokens_of(call.result())) for call in calls}) == 1
    assert host.service.log.read_text().count("method=DownloadCheckpoint") - before == 2  # files


def test_a_tenants_adapter_is_its_own(host: TrainerHost, away: Away) -> None:
    path = publish(host.run("bob"), "b")
    for _ in range(2):  # before and after the sampler has it
        assert refused(lambda: away.sampler.sample(model_path=path)) == NOT_FOUND
        with connected(away.sampler.service, host.root, host.keys["bob"]) as bob:
            assert tokens_of(bob.sample(model_path=path))


def test_what_is_deleted_is_not_found(host: TrainerHost, away: Away) -> None:
    path = publish(host.run(), "gone").partition("@")[0]
    assert tokens_of(away.sampler.sample(model_path=path))
    request = checkpoint_pb2.DeleteCheckpointRequest(path=path, request_id="d")
    host.checkpoints.DeleteCheckpoint(request, timeout=DEADLINE_S, **host.options())
    assert refused(lambda: away.sampler.sample(model_path=path)) == NOT_FOUND


def test_an_adapter_of_another_base_is_refused_by_name(host: TrainerHost, away: Away) -> None:
    folder = CheckpointStore(host.root / "store")
    publishing = Sampler(host.service, folder, away.sampler.stub, away.sampler.model)
    path = publishing.publish("r-1", seed=1, tenant="ada", base_fingerprint="0" * 64)
    wrong = grpc.StatusCode.FAILED_PRECONDITION, "WRONG_BASE_MODEL"
    assert refused(lambda: away.sampler.sample(model_path=path)) == wrong


def test_a_trainer_that_is_away_is_told_and_asked_again(host: TrainerHost, away: Away) -> None:
    run = host.run()
    path = publish(run, "back")
    name = path.partition("@")[0]
    assert tokens_of(away.sampler.sample(model_path=path))
    away.wire.away = True
    away.wire.cut()
    code, message, info = refusal(lambda: away.sampler.sample(model_path=name))
    assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNREACHABLE")
    assert f"the trainer at https://{away.wire.address}" in message
    assert tokens_of(away.sampler.sample(model_path=path))  # which was looked for just now
    away.wire.away = False
    step(run)
    newer = publish(run, "back")
    assert served(away.sampler, name) == newer


def served(sampler: Sampler, path: str) -> str:
    """The revision that is sampled once the trainer is there again."""
    while True:
        try:
            return str(sampler.sample(model_path=path).sequences[0].revision_path)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017  # its way back

"""What can go wrong between a sampler's store and the trainer that it asks."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from checkpoint_store import SAMPLER_WEIGHTS, WEIGHTS, CheckpointStore
from checkpoint_store.errors import CheckpointDamaged
from mint_core.access.key_file import digest_of, remove_key
from mint_core.errors import CheckpointNotFound, FailedPrecondition
from mint_core.lora.groups import LinearShape
from mint_core.lora.spec import AdapterSpec
from mint_core.lora.targets import initial_arrays
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from sampler_service.wire_store import downloads
from sampler_service.wire_store.access import TrainerAccess
from sampler_service.wire_store.errors import StoreRefused, StoreUnreachable
from sampler_service.wire_store.trainer import Trainer
from sampler_service.wire_store.wire_store import WireStore
from tests.authorities import Authority
from tests.checkpoint_files import publish_checkpoint, same
from tests.engines_in_process import random_arrays
from tests.harness.proxy import Proxy
from tests.keys import make_key
from tests.servers import running_summing_trainer
from tests.trainer_rpc import CALL_LIMIT_S, refused

SHAPE = LinearShape(2048, 4096)
SPEC = AdapterSpec(rank=128, alpha=32, use_rslora=False, seed=1, modules=("big",))  # 3 MB
ARRAYS = random_arrays(initial_arrays(SPEC, {"big": SHAPE}), 1)
MIDDLE = 1_500_000  # bytes of an answer
Code = grpc.StatusCode


class FaultyWire(Proxy):
    """Cuts a connection, or changes a byte, in the middle of what it brings."""

    def __init__(self, target: str) -> None:
        self.cuts = 0  # still to be made
        self.flips = 0
        super().__init__(target)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        total = 0
        while content := await reader.read(64 * 1024):
            before, total = total, total + len(content)
            if before < MIDDLE <= total:
                if self.cuts:
                    self.cuts -= 1
                    return
                if self.flips:
                    self.flips -= 1
                    middle = len(content) // 2
                    flipped = bytes([content[middle] ^ 1])
                    content = content[:middle] + flipped + content[middle + 1 :]
            writer.write(content)
            await writer.drain()


@dataclass(frozen=True, slots=True)
class Host:
    """A trainer with two tenants, whose engine has no model."""

    root: Path
    address: str
    keys: dict[str, str]

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.root / "store")

    def publish(self, name: str, tenant: str = "ada", **fields: Any) -> str:
        said = {
            "training_run_id": f"run-{tenant}",
            "kind": SAMPLER_WEIGHTS,
            "tenant": tenant,
            "base_model": "m",
            "base_fingerprint": "f",
            "spec": SPEC,
            "step": 1,
            "weights": ARRAYS,
            **fields,
        }
        return str(publish_checkpoint(self.store, name=name, **said).revision_path)

    def access(self, folder: Path, key: str = "sampler") -> TrainerAccess:
        (folder / "key").write_text(self.keys[key])
        return TrainerAccess(address=f"http://{self.address}", key=folder / "key")

    def opened(self, folder: Path, address: str = "") -> WireStore:
        access = self.access(folder)
        if address:
            access = replace(access, address=f"http://{address}")
        return WireStore(Trainer(access), folder / "local")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    root = tmp_path_factory.mktemp("host")
    keys = {tenant: make_key(tenant, root / "keys") for tenant in ("ada", "bob")}
    for name, scope in {"sampler": "fetch", "spare": "fetch", "reader": "read"}.items():
        tenant = "ada" if name == "reader" else name
        keys[name] = make_key(tenant, root / "keys", scopes=frozenset({scope}))
    with running_summing_trainer(root, keys=root / "keys") as service:
        yield Host(root, service.address, keys)


@pytest.fixture
def wire(host: Host) -> Iterator[FaultyWire]:
    proxy = FaultyWire(host.address)
    yield proxy
    proxy.close()


def brought(store: WireStore, path: str, tenant: str = "ada") -> bool:
    """Whether all of it comes, to the bit."""
    found = store.find(path, tenant=tenant, kind=SAMPLER_WEIGHTS)
    store.verify(found)
    return same(found.weights(), ARRAYS)


def went_on_at(caplog: pytest.LogCaptureFixture) -> list[int]:
    told = [r.getMessage() for r in caplog.records if "download goes on" in r.getMessage()]
    return [int(line.rpartition("=")[2]) for line in told]


def parts(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


def test_a_download_that_is_cut_goes_on_at_the_byte(
    host: Host, wire: FaultyWire, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = host.publish("cut")
    wire.cuts = 2
    assert brought(host.opened(tmp_path, wire.address), path)
    assert wire.cuts == 0
    first, *_ = went_on_at(caplog)
    assert 0 < first <= MIDDLE
    assert not parts(tmp_path)


def test_what_a_sampler_that_ended_has_begun_the_next_one_ends(
    host: Host, wire: FaultyWire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(downloads, "PATIENCE_S", 0.0)
    path = host.publish("restarted")
    wire.cuts = 1
    with pytest.raises(StoreUnreachable):
        brought(host.opened(tmp_path, wire.address), path)
    (part,) = parts(tmp_path)
    held_bytes = part.stat().st_size
    assert held_bytes > 0
    assert brought(host.opened(tmp_path), path)
    assert went_on_at(caplog) == [held_bytes]


def test_a_damaged_byte_is_refused_and_brought_again(
    host: Host, wire: FaultyWire, tmp_path: Path
) -> None:
    path, store = host.publish("damaged"), host.opened(tmp_path, wire.address)
    wire.flips = 1
    with pytest.raises(CheckpointDamaged, match="arrived with another SHA-256"):
        brought(store, path)
    assert brought(store, path)
    copy = next(tmp_path.rglob("adapter_model.safetensors"))
    copy.write_bytes(b"x" + copy.read_bytes()[1:])
    assert brought(store, path)


def test_a_beginning_that_was_damaged_here_is_brought_anew(
    host: Host, wire: FaultyWire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "PATIENCE_S", 0.0)
    path = host.publish("torn")
    wire.cuts = 1
    with pytest.raises(StoreUnreachable):
        brought(host.opened(tmp_path, wire.address), path)
    (part,) = parts(tmp_path)
    for content in (b"x" + part.read_bytes()[1:], part.read_bytes() * 9):
        part.write_bytes(content)
        assert brought(host.opened(tmp_path), path)
        next(tmp_path.rglob("adapter_model.safetensors")).rename(part)


def test_what_is_deleted_on_the_way_is_not_found(host: Host, tmp_path: Path) -> None:
    path, store = host.publish("deleted"), host.opened(tmp_path)
    found = store.find(path, tenant="ada", kind=SAMPLER_WEIGHTS)
    host.store.delete(path, tenant="ada")
    with pytest.raises(CheckpointNotFound):
        store.verify(found)


def test_a_samplers_key_gets_adapters_and_nothing_else(host: Host) -> None:
    adapter = host.publish("mine")
    state = host.publish("s", kind=WEIGHTS, exp_avg=ARRAYS, exp_avg_sq=ARRAYS)
    Get, Download = checkpoint_pb2.GetCheckpointRequest, checkpoint_pb2.DownloadCheckpointRequest
    of_ada = {"path": adapter, "for_tenant": "ada"}
    with grpc.insecure_channel(host.address) as channel:
        checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        runs = trainer_pb2_grpc.TrainerServiceStub(channel)

        def asked(call: Any, request: Any, key: str = "sampler") -> tuple[Code, str]:
            metadata = [("authorization", f"Bearer {host.keys[key]}")]
            error = refused(call, request, metadata=metadata)
            return error.code, error.reason

        for key in ("sampler", "reader", "ada"):
            metadata = [("authorization", f"Bearer {host.keys[key]}")]
            got = checkpoints.GetCheckpoint(Get(**of_ada), timeout=CALL_LIMIT_S, metadata=metadata)
            assert got.checkpoint.revision_path == adapter
            (*_, last) = checkpoints.DownloadCheckpoint(
                Download(**of_ada), timeout=CALL_LIMIT_S, metadata=metadata
            )
            assert last.offset_bytes + len(last.data) == last.file.size_bytes

        no, wrong = (
            (Code.PERMISSION_DENIED, "PERMISSION_DENIED"),
            (Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        )
        gone = (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
        assert asked(checkpoints.GetCheckpoint, Get(path=adapter, for_tenant="bob")) == gone
        assert asked(checkpoints.GetCheckpoint, Get(path=adapter)) == gone  # its own tenant's
        assert asked(checkpoints.GetCheckpoint, Get(**of_ada), "bob") == no
        for key in ("sampler", "ada"):
            request = Get(path=state, for_tenant="ada")
            assert asked(checkpoints.GetCheckpoint, request, key) == wrong
        assert asked(checkpoints.GetCheckpoint, Get(path=state)) == wrong
        delete = checkpoint_pb2.DeleteCheckpointRequest(path=adapter, request_id="d")
        assert asked(checkpoints.DeleteCheckpoint, delete) == no
        assert asked(checkpoints.ListCheckpoints, checkpoint_pb2.ListCheckpointsRequest()) == no
        assert asked(runs.ListTrainingRuns, trainer_pb2.ListTrainingRunsRequest()) == no


def test_a_key_that_is_revoked_is_said_and_another_takes_its_place(
    host: Host, tmp_path: Path
) -> None:
    path, store = host.publish("kept"), host.opened(tmp_path)
    assert brought(store, path)
    remove_key(host.root / "keys", digest_of(host.keys["sampler"])[:12])
    with pytest.raises(StoreRefused, match=r"not known to this server.*--store-api-key names"):
        brought(store, path)
    (tmp_path / "key").write_text(host.keys["spare"])
    host.keys["sampler"] = host.keys["spare"]
    assert brought(store, path)
    (tmp_path / "key").write_text(host.keys["bob"])
    with pytest.raises(StoreRefused, match="has not the scope `fetch`"):
        brought(store, path)


def test_what_is_wrong_is_said_at_start(host: Host, tmp_path: Path) -> None:
    good = host.access(tmp_path)
    Trainer(good).greet()
    Trainer(replace(good, address="http://127.0.0.1:1")).greet()  # it may come later
    (tmp_path / "no key").write_text("sk-mint-none")
    for odd, says in (
        (replace(good, address=good.address.replace("http", "https")), "speaks without TLS"),
        (replace(good, key=tmp_path / "no key"), "the API key is not known"),
        (replace(good, key=None), "carries no API key"),
    ):
        with pytest.raises(StoreRefused, match=says):
            Trainer(odd).greet()
    with pytest.raises(FailedPrecondition, match=r"`store_api_key` .* cannot be read"):
        Trainer(replace(good, key=tmp_path / "none"))


def test_what_is_wrong_with_tls_is_said_at_start(tmp_path: Path) -> None:
    ca, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    cert, key = ca.issue("server", "127.0.0.1")
    flags = {"tls_cert": cert, "tls_key": key, "client_ca": ca.file}
    mine, theirs = ca.issue("sampler"), other.issue("sampler")
    with running_summing_trainer(tmp_path, **flags) as service:
        good = TrainerAccess(address=service.address, ca=ca.file, cert=mine[0], cert_key=mine[1])
        Trainer(good).greet()
        plain = service.address.replace("https", "http")
        for odd, says in (
            (replace(good, ca=other.file), "its certificate is not good by --store-tls-ca"),
            (
                replace(good, address=service.address.replace("127.0.0.1", "localhost")),
                "Hostname mismatch",
            ),
            (replace(good, cert=None, cert_key=None), "it wants a certificate; give --store-tls"),
            (replace(good, cert=theirs[0], cert_key=theirs[1]), "does not take the certificate"),
            (TrainerAccess(address=plain), "it speaks TLS alone"),
        ):
            with pytest.raises(StoreRefused, match=says):
                Trainer(odd).greet()
    with pytest.raises(FailedPrecondition, match=r"`store_tls_ca` .* holds no certificates"):
        Trainer(replace(good, ca=mine[1]))
    with pytest.raises(FailedPrecondition, match="is not the private key"):
        Trainer(replace(good, cert_key=theirs[1]))

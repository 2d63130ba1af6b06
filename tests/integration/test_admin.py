"""What keys may, what an operator does to a running server, and what is on record of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

import mint
from mint_core.rpc.metrics import Metrics
from mintrpc.v1 import admin_pb2, admin_pb2_grpc, trainer_pb2, trainer_pb2_grpc
from tests.keys import make_key
from tests.samplers import refusal
from tests.servers import RunningService, running_summing_trainer

LIMIT_S = 30.0


@dataclass
class Administered:
    service: RunningService
    keys: dict[str, str]
    file: Path
    audit: Path

    def header(self, name: str) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.keys.get(name, name)}")]

    def records(self) -> list[dict[str, Any]]:
        self.service.log_text()  # behind an answer: records come then
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Administered]:
    folder = tmp_path_factory.mktemp("administered")
    keys = {
        "root": make_key("ops", folder / "keys", scopes=frozenset({"admin"}), comment="on call"),
        "ann": make_key("ann", folder / "keys", weight=2.0),
        "reader": make_key("ann", folder / "keys", scopes=frozenset({"read"})),
        "sampling": make_key("ann", folder / "keys", scopes=frozenset({"sample"})),
    }
    files = {"keys": folder / "keys", "audit_log": folder / "audit"}
    with running_summing_trainer(folder, **files) as service:
        yield Administered(service, keys, folder / "keys", folder / "audit")


@pytest.fixture
def admin(server: Administered) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    with grpc.insecure_channel(server.service.address) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def test_a_key_does_what_its_scopes_say(server: Administered) -> None:
    with mint.ServiceClient(base_url=server.service.address, api_key=server.keys["ann"]) as ann:
        run = ann.create_lora_training_client(rank=1)
    with grpc.insecure_channel(server.service.address) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        get = trainer_pb2.GetTrainingRunRequest(training_run_id=run.training_run_id)
        delete = trainer_pb2.DeleteTrainingRunRequest(training_run_id=run.training_run_id)
        for name, call, request, allowed in [
            ("ann", stub.GetTrainingRun, get, True),
            ("reader", stub.GetTrainingRun, get, True),
            ("reader", stub.DeleteTrainingRun, delete, False),
            ("sampling", stub.GetTrainingRun, get, False),
            ("root", stub.GetTrainingRun, get, False),
        ]:
            if allowed:
                call(request, metadata=server.header(name), timeout=LIMIT_S)
                continue
            code, message, info = refusal(
                lambda call=call, request=request, name=name: call(  # type: ignore[misc]
                    request, metadata=server.header(name), timeout=LIMIT_S
                )
            )
            assert (code, info.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
            assert "and this call takes `" in message


def test_administration_takes_its_scope(
    server: Administered, admin: admin_pb2_grpc.AdminServiceStub
) -> None:
    for name in ("ann", "reader"):
        code, _, _ = refusal(
            lambda name=name: admin.ListKeys(  # type: ignore[misc]
                admin_pb2.ListKeysRequest(), metadata=server.header(name)
            )
        )
        assert code == grpc.StatusCode.PERMISSION_DENIED


def test_a_key_is_made_used_listed_and_revoked_at_once(
    server: Administered, admin: admin_pb2_grpc.AdminServiceStub
) -> None:
    root = server.header("root")
    request = admin_pb2.CreateKeyRequest(tenant="bob", comment="bob's", scopes=["train", "read"])
    request.expire_time.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    made = admin.CreateKey(request, metadata=root)
    assert made.key.tenant == "bob"
    assert not made.key.HasField("last_use_time")

    with grpc.insecure_channel(server.service.address) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        bob = server.header(made.api_key)
        with mint.ServiceClient(base_url=server.service.address, api_key=made.api_key) as client:
            run = client.create_lora_training_client(rank=1).training_run_id
        watch = stub.WatchTrainingRun(
            trainer_pb2.WatchTrainingRunRequest(training_run_id=run), metadata=bob, timeout=LIMIT_S
        )
        next(watch)
        keys = admin.ListKeys(admin_pb2.ListKeysRequest(), metadata=root).keys
        (listed,) = [key for key in keys if key.key_id == made.key.key_id]
        assert (listed.comment, sorted(listed.scopes)) == ("bob's", ["read", "train"])
        assert listed.HasField("last_use_time")
        assert made.api_key not in str(keys)

        revoke = admin_pb2.RevokeKeyRequest(key_id=made.key.key_id)
        assert admin.RevokeKey(revoke, metadata=root).key.tenant == "bob"
        with pytest.raises(grpc.RpcError) as ended:  # the stream that was open too
            for _ in watch:
                pass
        assert ended.value.code() == grpc.StatusCode.UNAUTHENTICATED
        code, _, _ = refusal(
            lambda: stub.ListTrainingRuns(trainer_pb2.ListTrainingRunsRequest(), metadata=bob)
        )
        assert code == grpc.StatusCode.UNAUTHENTICATED
    assert refusal(lambda: admin.RevokeKey(revoke, metadata=root))[0] == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tenant": ""}, "`tenant`"),
        ({"tenant": "a b"}, "`tenant`"),
        ({"tenant": "x", "scopes": ["cook"]}, "`scopes`"),
        ({"tenant": "x", "comment": "a\nb"}, "`comment`"),
        ({"tenant": "x", "weight": 1e6}, "`weight`"),
        ({"tenant": "ann", "weight": 3.0}, "`weight` of tenant ann is 2"),
    ],
)
def test_a_bad_key_is_refused_by_field(
    server: Administered,
    admin: admin_pb2_grpc.AdminServiceStub,
    fields: dict[str, Any],
    why: str,
) -> None:
    before = server.file.read_text()
    request = admin_pb2.CreateKeyRequest(**fields)
    code, message, _ = refusal(lambda: admin.CreateKey(request, metadata=server.header("root")))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert why in message
    assert server.file.read_text() == before


def test_tenants_and_the_servers_state_are_told(
    server: Administered, admin: admin_pb2_grpc.AdminServiceStub
) -> None:
    with mint.ServiceClient(base_url=server.service.address, api_key=server.keys["ann"]) as ann:
        ann.create_lora_training_client(rank=1)
    root = server.header("root")
    tenants = admin.ListTenants(admin_pb2.ListTenantsRequest(), metadata=root).tenants
    by_name = {tenant.tenant: tenant for tenant in tenants}
    assert (by_name["ann"].weight, by_name["ops"].weight) == (2.0, 1.0)
    assert by_name["ann"].quotas["runs"] == 20_000
    assert by_name["ann"].held["runs"] >= 1

    state = admin.GetServerState(admin_pb2.GetServerStateRequest(), metadata=root)
    assert state.engine_ready
    assert state.calls == 1  # this one
    assert not state.draining
    assert not state.HasField("certificate_expire_time")


def test_what_changes_something_is_on_record(server: Administered) -> None:
    with mint.ServiceClient(base_url=server.service.address, api_key=server.keys["ann"]) as ann:
        run = ann.create_lora_training_client(rank=1)
        run.save_state("mine").result(LIMIT_S)
        ann.get_training_run(run.training_run_id)
        with pytest.raises(mint.APIError):
            ann.create_training_client_from_state("mint://run-none/weights/x")
    records = [record for record in server.records() if record["tenant"] == "ann"]
    saved = next(
        record
        for record in records
        if record.get("run") == run.training_run_id and record["method"] == "SaveState"
    )
    assert {name: saved[name] for name in ("code", "name", "sequence")} == {
        "code": "OK",
        "name": "mine",
        "sequence": 1,
    }
    assert len(saved["key"]) == 12
    assert saved["peer"].startswith("ipv4:127.0.0.1")
    assert datetime.fromisoformat(saved["time"]).tzinfo is not None
    made = [record for record in records if record["method"] == "CreateTrainingRun"]
    assert run.training_run_id in [record.get("run") for record in made]
    assert made[-1]["code"] == "NOT_FOUND"
    assert made[-1]["reason"] == "CHECKPOINT_NOT_FOUND"
    assert not [record for record in records if record["method"].startswith(("Get", "List"))]
    assert server.keys["ann"] not in server.audit.read_text()
    assert server.audit.stat().st_mode & 0o777 == 0o600


def test_draining_ends_the_server_in_order(tmp_path: Path) -> None:
    """Without keys, on loopback: whoever is on this host may."""
    with running_summing_trainer(tmp_path) as service:
        with grpc.insecure_channel(service.address) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            code, _, _ = refusal(lambda: stub.ListKeys(admin_pb2.ListKeysRequest()))
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            stub.Drain(admin_pb2.DrainRequest(), timeout=LIMIT_S)
        assert service.process.wait(LIMIT_S) == 0


def test_usage_is_told_by_tenant() -> None:
    metrics = Metrics()
    counter = metrics.counter("mint_usage_tokens", "Tokens", ["tenant", "kind"])
    counter.labels("ann", "forward").inc(3)
    assert metrics.by_tenant() == {"ann": {"mint_usage_tokens_total{kind=forward}": 3.0}}

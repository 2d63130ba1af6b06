"""What an operator sees of a sampler's replicas, and has done to them while they answer."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from mintrpc.v1 import admin_pb2, admin_pb2_grpc, model_pb2, model_pb2_grpc
from tests.integration.test_replicas import ENGINES_S, LONG, SOME, begun_stream, requests, rest
from tests.keys import make_key
from tests.metrics import scrape, value
from tests.samplers import DEADLINE_S, Sampler, connected, refusal
from tests.servers import running_sampler

State = admin_pb2.ReplicaStatus


@dataclass(frozen=True, slots=True)
class Administered:
    sampler: Sampler  # of ann
    admin: admin_pb2_grpc.AdminServiceStub
    model: Path
    audit: Path
    root: tuple[tuple[str, str], ...]

    def call(self, method: str, **fields: str) -> Any:
        request = getattr(admin_pb2, f"{method}Request")(**fields)
        return getattr(self.admin, method)(request, metadata=self.root, timeout=DEADLINE_S)

    def listed(self) -> dict[str, admin_pb2.ReplicaStatus]:
        return {each.name: each for each in self.call("ListReplicas").replicas}

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + ENGINES_S
        while not holds():
            assert time.monotonic() < deadline, self.listed()
            time.sleep(0.05)  # nothing tells of it


@pytest.fixture(scope="module")
def served(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Administered]:
    folder = tmp_path_factory.mktemp("served")
    model = Path(shutil.copytree(qwen3_folder, folder / "tiny"))  # one that tests may spoil
    root = make_key("ops", folder / "keys", scopes=frozenset({"admin"}))
    ann = make_key("ann", folder / "keys")
    files = {"keys": folder / "keys", "audit_log": folder / "audit"}
    store, flags = folder / "store", {"base_model_name": "tiny", "replicas": 2}
    with (
        running_sampler(model, store, **flags, **files) as service,
        connected(service, store, ann) as sampler,
        grpc.insecure_channel(service.address) as channel,
    ):
        header = (("authorization", f"Bearer {root}"),)
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        yield Administered(sampler, admin, model, folder / "audit", header)


def test_replicas_that_come_and_go_under_load_change_no_token(served: Administered) -> None:
    sampler = served.sampler
    path = sampler.publish("r-load", seed=1, tenant="ann")
    seeds = range(12)

    def answer(seed: int) -> Any:
        params = {**SOME, "seed": seed}
        return sampler.sample(model_path=path, num_samples=2, params=params).sequences

    expected = [answer(seed) for seed in seeds]
    with ThreadPoolExecutor(6) as users:
        for new in ("b", "c"):
            found = [users.submit(answer, seed) for seed in seeds]
            assert served.call("AddReplica", name=new).replica.state == State.STATE_UP
            oldest = next(iter(served.listed()))
            assert served.call("DrainReplica", name=oldest).replica.state == State.STATE_DRAINING
            assert [each.result() for each in found] == expected
            served.until(lambda gone=oldest: gone not in served.listed())  # type: ignore[misc]
    assert list(served.listed()) == ["b", "c"]
    assert len(sampler.engines()) == 2
    with ThreadPoolExecutor(6) as users:
        assert list(users.map(answer, seeds)) == expected
    seen = scrape(sampler.service.metrics_address)
    assert all(requests(seen, replica=name) for name in "bc")
    ready = [dict(labels)["replica"] for name, labels in seen if name == "mint_replica_ready"]
    assert ready == ["b", "c"]
    assert value(seen, "mint_engine_restarts") == 0


def test_a_drained_replica_ends_what_it_has_and_the_last_one_stays(served: Administered) -> None:
    sampler = served.sampler
    fields = {"num_samples": 3, "params": LONG}
    expected = rest(*begun_stream(sampler, **fields))
    stream, tokens = begun_stream(sampler, **fields)
    (busy,) = [name for name, each in served.listed().items() if each.requests]
    told = served.call("DrainReplica", name=busy).replica
    assert (told.state, told.requests, told.tokens > 0) == (State.STATE_DRAINING, 1, True)
    assert served.call("DrainReplica", name=busy).replica.state == State.STATE_DRAINING
    others = [name for name in served.listed() if name != busy]
    code, message, _ = refusal(lambda: served.call("DrainReplica", name=others[0]))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert f"no replica but `{others[0]}` takes requests" in message
    sampler.sample()
    assert rest(stream, tokens) == expected
    served.until(lambda: list(served.listed()) == others)
    log = sampler.service.log_text()
    assert log.index(f"replica={busy} drains") < log.index(f"replica={busy} is gone")
    with grpc.insecure_channel(sampler.service.address) as channel:
        said = model_pb2_grpc.ModelServiceStub(channel).GetServerCapabilities(
            model_pb2.GetServerCapabilitiesRequest(), metadata=sampler.metadata
        )
    assert (said.replicas, said.replicas_ready) == (1, 1)
    assert "replicas" in said.features
    assert served.call("AddReplica").replica.name == "2"  # numbers are not given twice


def test_a_replica_that_cannot_start_is_not_added(served: Administered) -> None:
    before = list(served.listed())
    hidden = served.model.rename(served.model.with_name("hidden"))
    code, _, _ = refusal(lambda: served.call("AddReplica", name="broken"))
    hidden.rename(served.model)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert list(served.listed()) == before
    assert served.call("AddReplica", name="broken").replica.state == State.STATE_UP
    served.call("DrainReplica", name="broken")
    served.until(lambda: list(served.listed()) == before)


def test_replicas_are_an_administrators_and_on_record(served: Administered) -> None:
    name = next(iter(served.listed()))
    calls: list[tuple[Any, Any]] = [
        (served.admin.ListReplicas, admin_pb2.ListReplicasRequest()),
        (served.admin.DrainReplica, admin_pb2.DrainReplicaRequest(name="none")),
        (served.admin.AddReplica, admin_pb2.AddReplicaRequest(device="cpu", name=name)),
    ]
    for call, request in calls:
        code, _, _ = refusal(lambda c=call, r=request: c(r, metadata=served.sampler.metadata))  # type: ignore[misc]
        assert code == grpc.StatusCode.PERMISSION_DENIED
    for call, request in calls[1:]:
        refusal(lambda c=call, r=request: c(r, metadata=served.root))  # type: ignore[misc]
    served.sampler.service.log_text()
    records = served.audit.read_text()
    assert '"method": "DrainReplica", "name": "none"' in records
    assert f'"method": "AddReplica", "name": "{name}", "device": "cpu"' in records
    assert "ListReplicas" not in records


@pytest.mark.parametrize(
    ("method", "fields", "code", "why"),
    [
        ("AddReplica", {"device": "tpu"}, "INVALID_ARGUMENT", "`device` 'tpu' is none"),
        ("AddReplica", {"device": "cuda:0"}, "INVALID_ARGUMENT", "`device` 'cuda:0' does not go"),
        ("AddReplica", {"name": "a b"}, "INVALID_ARGUMENT", "`name` 'a b' is none"),
        ("AddReplica", {"name": "NAME"}, "ALREADY_EXISTS", "there is a replica"),
        ("DrainReplica", {}, "INVALID_ARGUMENT", "`name` is empty"),
        ("DrainReplica", {"name": "x"}, "NOT_FOUND", "there is no replica `x`"),
        ("ListGroups", {}, "FAILED_PRECONDITION", "ask the trainer's port"),
    ],
)
def test_bad_requests_about_replicas_are_refused(
    served: Administered, method: str, fields: dict[str, str], code: str, why: str
) -> None:
    given = {key: each.replace("NAME", next(iter(served.listed()))) for key, each in fields.items()}
    found, message, _ = refusal(lambda: served.call(method, **given))
    assert (found.name, why in message) == (code, True), message

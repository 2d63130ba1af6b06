"""One trainer, several engines of sums: what users see of groups, and what an operator does."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import mint
from mintrpc.v1 import admin_pb2, admin_pb2_grpc, model_pb2, model_pb2_grpc, trainer_pb2
from mintrpc.v1 import trainer_pb2_grpc as trainer_grpc
from tests.engines.rows import BROKEN
from tests.keys import make_key
from tests.samplers import refusal
from tests.servers import RunningService, running_summing_trainer
from tests.trainer_rpc import CALL_LIMIT_S, create
from tests.training_load import train_all
from tests.warm import children

USERS, STEPS, VOCABULARY = 4, 8, 60
State = admin_pb2.GroupStatus


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What users are answered by one group that nothing befalls."""
    with running_summing_trainer(tmp_path_factory.mktemp("quiet")) as service:
        return [answers for answers, _ in train_all(service.address, USERS, STEPS, VOCABULARY)]


@contextmanager
def administered(
    folder: Path, **flags: object
) -> Iterator[tuple[RunningService, admin_pb2_grpc.AdminServiceStub]]:
    with (
        running_summing_trainer(folder, **{"groups": 2, **flags}) as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        yield service, admin_pb2_grpc.AdminServiceStub(channel)


def listed(admin: admin_pb2_grpc.AdminServiceStub) -> dict[str, admin_pb2.GroupStatus]:
    found = admin.ListGroups(admin_pb2.ListGroupsRequest(), timeout=CALL_LIMIT_S).groups
    return {group.name: group for group in found}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + CALL_LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # nothing tells of it


def engines(service: RunningService) -> list[psutil.Process]:
    """In the order of their groups, while each is its group's first."""
    return sorted(children(service.process.pid), key=lambda child: child.create_time())


def test_runs_of_two_groups_are_what_they_are_in_one(tmp_path: Path, quiet: list[Any]) -> None:
    with administered(tmp_path) as (service, admin):
        found = train_all(service.address, USERS, STEPS, VOCABULARY)

        assert [answers for answers, _ in found] == quiet
        assert [group.runs for group in listed(admin).values()] == [2, 2]


def test_drains_and_new_groups_under_load_change_no_bit(tmp_path: Path, quiet: list[Any]) -> None:
    """At some answers of the first user the oldest group is drained and one is added."""
    at = iter((4, 9, 14, 19))
    with administered(tmp_path) as (service, admin):
        wanted = [next(at)]

        def act(user: int, answers: int) -> None:
            if user == 0 and answers == wanted[0]:
                wanted[0] = next(at, 0)
                admin.AddGroup(admin_pb2.AddGroupRequest(device="cpu"), timeout=CALL_LIMIT_S)
                there = listed(admin).items()
                oldest = next(name for name, g in there if g.state != State.STATE_DRAINING)
                admin.DrainGroup(admin_pb2.DrainGroupRequest(name=oldest), timeout=CALL_LIMIT_S)

        found = train_all(service.address, USERS, STEPS, VOCABULARY, act)

        assert [answers for answers, _ in found] == quiet
        until(lambda: len(listed(admin)) == 2)
        assert list(listed(admin)) == ["group-4", "group-5"]
        assert sum(group.runs for group in listed(admin).values()) == USERS
        assert len(engines(service)) == 2
        assert " moves group-0->" in service.log_text()


def test_a_dead_engine_costs_its_own_runs_alone(tmp_path: Path, quiet: list[Any]) -> None:
    killed = threading.Event()
    with administered(tmp_path) as (service, admin):
        (first, _) = engines(service)

        def act(user: int, answers: int) -> None:
            if user == 1 and answers == 6 and not killed.is_set():
                killed.set()
                os.kill(first.pid, signal.SIGKILL)

        found = train_all(service.address, USERS, STEPS, VOCABULARY, act)

        assert [answers for answers, _ in found] == quiet
        restarts = [group.engine_restarts for group in listed(admin).values()]
        assert restarts == [1, 0]
        assert [group.runs for group in listed(admin).values()] == [2, 2]


def test_a_group_that_cannot_start_again_gives_its_runs_away(
    tmp_path: Path, quiet: list[Any]
) -> None:
    killed = threading.Event()
    with administered(tmp_path) as (service, admin):
        (_, second) = engines(service)

        def act(user: int, answers: int) -> None:
            if user == 1 and answers == 6 and not killed.is_set():
                killed.set()
                (tmp_path / "model" / BROKEN).touch()
                os.kill(second.pid, signal.SIGKILL)

        found = train_all(service.address, USERS, STEPS, VOCABULARY, act)

        assert [answers for answers, _ in found] == quiet
        groups = listed(admin)
        assert [groups[name].state for name in groups] == [State.STATE_UP, State.STATE_FAILED]
        assert [group.runs for group in groups.values()] == [4, 0]
        (tmp_path / "model" / BROKEN).unlink()
        until(lambda: listed(admin)["group-1"].state == State.STATE_UP)


def test_groups_are_seen_in_capabilities_runs_watches_and_metrics(tmp_path: Path) -> None:
    from urllib.request import urlopen

    with administered(tmp_path) as (service, admin):
        with grpc.insecure_channel(service.address) as channel:
            capabilities = model_pb2_grpc.ModelServiceStub(channel).GetServerCapabilities(
                model_pb2.GetServerCapabilitiesRequest()
            )
            assert "groups" in capabilities.features
            found = [(group.name, group.device, group.ready) for group in capabilities.groups]
            assert found == [("group-0", "cpu", True), ("group-1", "cpu", True)]

            stub = trainer_grpc.TrainerServiceStub(channel)
            run = create(stub)
            before = run.describe().group
            watch = stub.WatchTrainingRun(
                trainer_pb2.WatchTrainingRunRequest(training_run_id=run.id), timeout=CALL_LIMIT_S
            )
            assert next(watch).training_run.group == before
            admin.DrainGroup(admin_pb2.DrainGroupRequest(name=before))
            told = next(event for event in watch if event.HasField("training_run"))
            watch.cancel()
            assert {before, told.training_run.group} == {"group-0", "group-1"}
            run.send(run.forward_backward())
        with urlopen(f"http://{service.metrics_address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        assert f'mint_group_ready{{group="{told.training_run.group}"}} 1.0' in lines
        assert "mint_engine_ready 1.0" in lines


def test_one_group_is_one_too(tmp_path: Path) -> None:
    with administered(tmp_path, groups=1) as (_, admin):
        (only,) = listed(admin).values()
        assert (only.name, only.state) == ("group-0", State.STATE_UP)
        code, message, _ = refusal(
            lambda: admin.DrainGroup(admin_pb2.DrainGroupRequest(name="group-0"))
        )
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "no group but `group-0` takes runs" in message


def test_groups_are_an_administrators_and_on_record(tmp_path: Path) -> None:
    root = make_key("ops", tmp_path / "keys", scopes=frozenset({"admin"}))
    ann = make_key("ann", tmp_path / "keys")
    flags = {"keys": tmp_path / "keys", "audit_log": tmp_path / "audit"}
    with administered(tmp_path, **flags) as (service, admin):
        with mint.ServiceClient(base_url=service.address, api_key=ann) as client:
            client.create_lora_training_client(rank=1)
        calls: list[tuple[Any, Any]] = [
            (admin.ListGroups, admin_pb2.ListGroupsRequest()),
            (admin.DrainGroup, admin_pb2.DrainGroupRequest(name="group-1")),
            (admin.AddGroup, admin_pb2.AddGroupRequest(device="cpu", name="more")),
        ]
        for call, request in calls:
            header = [("authorization", f"Bearer {ann}")]
            code, _, _ = refusal(lambda c=call, r=request, h=header: c(r, metadata=h))  # type: ignore[misc]
            assert code == grpc.StatusCode.PERMISSION_DENIED
            call(request, metadata=[("authorization", f"Bearer {root}")], timeout=CALL_LIMIT_S)
        service.log_text()
        records = (tmp_path / "audit").read_text()
        assert '"method": "DrainGroup", "name": "group-1"' in records
        assert '"method": "AddGroup", "name": "more", "device": "cpu"' in records
        assert "ListGroups" not in records


@pytest.mark.parametrize(
    ("request_", "code", "why"),
    [
        (admin_pb2.AddGroupRequest(device="tpu"), "INVALID_ARGUMENT", "`device` 'tpu' is none"),
        (admin_pb2.AddGroupRequest(name="a b"), "INVALID_ARGUMENT", "`name` 'a b' is none"),
        (admin_pb2.AddGroupRequest(name="group-0"), "ALREADY_EXISTS", "there is a group"),
        (admin_pb2.DrainGroupRequest(), "INVALID_ARGUMENT", "`name` is empty"),
        (admin_pb2.DrainGroupRequest(name="x"), "NOT_FOUND", "there is no group `x`"),
    ],
)
def test_bad_requests_about_groups_are_refused(
    two_groups: admin_pb2_grpc.AdminServiceStub, request_: Any, code: str, why: str
) -> None:
    method = type(request_).__name__.removesuffix("Request")
    found, message, _ = refusal(lambda: getattr(two_groups, method)(request_))
    assert (found.name, why in message) == (code, True), message


@pytest.fixture(scope="module")
def two_groups(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    with administered(tmp_path_factory.mktemp("two")) as (_, admin):
        yield admin


def test_a_group_that_cannot_start_is_not_added(tmp_path: Path) -> None:
    with administered(tmp_path) as (_, admin):
        (tmp_path / "model" / BROKEN).touch()
        code, message, _ = refusal(
            lambda: admin.AddGroup(admin_pb2.AddGroupRequest(), timeout=CALL_LIMIT_S)
        )
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "it is broken" in message
        assert list(listed(admin)) == ["group-0", "group-1"]

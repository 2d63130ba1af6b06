"""Seeded messages to every RPC, headers of every kind, and connections that are no client's: no
INTERNAL, no engine ended, nothing kept, and a neighbour's numbers bitwise those of a quiet hour.
`make fuzz` sends 100,000 messages, and as many of the rest as that is for here.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.authorities import Authority
from tests.hostile.doors import Port, half_open, keys, knocks
from tests.hostile.fuzz import fuzz
from tests.hostile.stage import Stage, staged

COUNT = int(os.environ.get("FUZZ_COUNT", "1000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
RUNS = 3
MOST_HELD = 300  # descriptors, of this process too


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stage(
    qwen3_folder: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    with staged(qwen3_folder, tmp_path_factory.mktemp("stage"), 1, authority) as stage:
        yield stage


@pytest.fixture(scope="module")
def quiet(stage: Stage) -> list[Any]:
    return stage.neighbour.work()


@pytest.fixture(params=[0, 1], ids=["trainer", "sampler"])
def port(
    request: pytest.FixtureRequest, stage: Stage, authority: Authority, tmp_path: Path
) -> Port:
    ended = datetime.now(UTC) - timedelta(days=1)
    pairs = {
        "good": authority.issue("client"),
        "foreign": Authority(tmp_path).issue("client"),
        "expired": authority.issue("late", expires=ended),
    }
    number = int(stage.services[request.param].address.rpartition(":")[2])
    return Port(number, authority.file, pairs)


def test_any_message_is_answered_as_the_contract_says(stage: Stage, quiet: list[Any]) -> None:
    with stage.unharmed(quiet), ExitStack() as runs:
        names = [runs.enter_context(stage.hostile.run()) for _ in range(RUNS)]
        codes = fuzz(stage.hostile, names, SEED, COUNT)
        assert sum(codes.values()) == COUNT
        runs.pop_all()  # they may be gone by now


def test_a_call_comes_in_by_one_key_and_by_nothing_else(stage: Stage, quiet: list[Any]) -> None:
    with stage.unharmed(quiet):
        codes = keys(stage.hostile, SEED, COUNT // 5)
    assert {"OK", "UNAUTHENTICATED", "NOT SENT"} <= codes.keys()


def test_what_comes_to_a_port_and_is_no_client_harms_nobody(
    stage: Stage, quiet: list[Any], port: Port
) -> None:
    with stage.unharmed(quiet):
        answered = knocks(port, SEED, COUNT // 10)
    assert answered["conversation"] > 0
    assert not answered["certificate"]


def test_handshakes_that_are_held_open_keep_nobody_out(
    stage: Stage, quiet: list[Any], port: Port
) -> None:
    with stage.unharmed(quiet), half_open(port, min(COUNT // 10, MOST_HELD)):
        assert stage.neighbour.work() == quiet
        with newcomer(port) as channel:
            grpc.channel_ready_future(channel).result(60)


def newcomer(port: Port) -> grpc.Channel:
    """A connection of somebody who comes only now."""
    cert, key = port.pairs["good"]
    files = port.authority.read_bytes(), key.read_bytes(), cert.read_bytes()
    return grpc.secure_channel(f"localhost:{port.number}", grpc.ssl_channel_credentials(*files))

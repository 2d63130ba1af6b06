"""A service process from start to stop, on an engine without a model."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mintrpc.v1 import model_pb2, model_pb2_grpc
from tests.servers import stop

LIMIT_S = 60.0


def command(model: Path, store: Path, *flags: str) -> list[str]:
    module = (sys.executable, "-m", "tests.engines.echo_service")
    return [*module, "--base-model", str(model), "--store", str(store), *flags]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tokenizer's files, a secret and a large file."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"[" + b"1," * 1_500_000 + b"1]")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    (folder / "secret.env").write_text("KEY=1")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    return folder


@contextmanager
def running(model: Path, tmp_path: Path, *flags: str) -> Iterator[tuple[Any, dict[str, str]]]:
    ready_file = tmp_path / "ready.json"
    log = (tmp_path / "log").open("w")
    process: subprocess.Popen[bytes] = subprocess.Popen(
        command(model, tmp_path / "store", "--ready-file", str(ready_file), *flags), stderr=log
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not ready_file.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process, json.loads(ready_file.read_text())
    finally:
        stop(process)
        log.close()


def refusal(model: Path, tmp_path: Path, *flags: str) -> str:
    """The one line that a service which cannot start leaves."""
    done = subprocess.run(
        command(model, tmp_path / "store", *flags), capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if " ERROR " in line]
    return line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_listens_and_stops_when_told(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with running(model, tmp_path) as (process, addresses):
        engines = psutil.Process(process.pid).children()
        assert len(engines) == 1
        process.send_signal(number)
        assert process.wait(LIMIT_S) == 0

    log = (tmp_path / "log").read_text()
    assert f"trainer listening on {addresses['address']}" in log
    assert re.search(r"INFO .* no `keys`: loopback only, every caller is .*`default`", log)
    assert "Traceback" not in log
    assert not psutil.pid_exists(engines[0].pid)


def test_a_task_that_dies_ends_the_service_and_is_told(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path, "--task-error", "out of luck") as (process, _):
        assert process.wait(LIMIT_S) == 1

    log = (tmp_path / "log").read_text()
    assert "CRITICAL mint_core.hosting.tasks the task `doomed` has died\nTraceback" in log
    assert log.endswith("cannot go on without a task that has died: out of luck\n")


@contextmanager
def starting(model: Path, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """A service whose engine has its pipe but does not listen to it, and that engine."""
    flags = ("--metrics-address", "", "--start-s", "300")
    with (tmp_path / "log").open("w") as log:
        process = psutil.Popen(command(model, tmp_path / "store", *flags), stderr=log)
    deadline = time.monotonic() + LIMIT_S
    while "echo engine starts" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (engine,) = process.children()
    yield process, engine
    engine.wait(LIMIT_S)
    process.wait()


def test_it_stops_when_told_while_the_engine_starts(model: Path, tmp_path: Path) -> None:
    with starting(model, tmp_path) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0

    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "listening" not in log


def test_a_deaf_engine_ends_when_its_front_is_killed(model: Path, tmp_path: Path) -> None:
    with starting(model, tmp_path) as (process, _):
        process.kill()


def test_an_idle_engine_ends_when_its_front_is_killed(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path) as (process, _):
        (engine,) = psutil.Process(process.pid).children()
        process.kill()
        engine.wait(LIMIT_S)


def test_health_follows_the_engine(model: Path, tmp_path: Path) -> None:
    Status = health_pb2.HealthCheckResponse
    with (
        running(model, tmp_path) as (process, addresses),
        grpc.insecure_channel(addresses["address"]) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=LIMIT_S, wait_for_ready=True
        )
        states = [next(watch).status]
        while states[-1] != Status.SERVING:
            states.append(next(watch).status)
        psutil.Process(process.pid).children()[0].kill()
        states += [next(watch).status, next(watch).status]
        watch.cancel()
    assert states[-3:] == [Status.SERVING, Status.NOT_SERVING, Status.SERVING]


def test_metrics_tell_of_the_engine(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path) as (_, addresses):
        host, port = addresses["metrics_address"].split(":")
        with socket.create_connection((host, int(port)), LIMIT_S) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            page = b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    assert "mint_engine_ready 1.0" in page
    assert "mint_engine_restarts 0.0" in page
    (resident,) = re.findall(r"(?m)^mint_engine_resident_memory_bytes (\S+)", page)
    assert float(resident) > 1e6


def test_capabilities_and_tokenizer_of_the_model(model: Path, tmp_path: Path) -> None:
    with (
        running(model, tmp_path) as (_, addresses),
        grpc.insecure_channel(addresses["address"]) as channel,
    ):
        stub = model_pb2_grpc.ModelServiceStub(channel)
        offered = stub.GetServerCapabilities(model_pb2.GetServerCapabilitiesRequest())
        pieces = list(stub.GetTokenizer(model_pb2.GetTokenizerRequest(base_model="echo")))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.GetTokenizer(model_pb2.GetTokenizerRequest(base_model="other")))

    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "'other' is not served here; this server serves 'echo'" in caught.value.details()
    assert offered.engine_ready
    assert offered.role == model_pb2.SERVICE_ROLE_TRAINER
    assert offered.limits.max_message_bytes == 256 * 1024 * 1024
    (served,) = offered.base_models
    assert (served.name, served.context_length, list(served.eos_token_ids)) == ("echo", 128, [2])
    assert len(served.tokenizer_fingerprint) == 64
    assert served.text_only

    files: dict[str, bytes] = {}
    for piece in pieces:
        assert piece.offset_bytes == len(files.setdefault(piece.name, b""))
        files[piece.name] += piece.data
    assert files == {
        name: (model / name).read_bytes()
        for name in ("merges.txt", "tokenizer.json", "tokenizer_config.json")
    }
    for piece in pieces:
        assert piece.size_bytes == len(files[piece.name])
        assert piece.sha256 == hashlib.sha256(files[piece.name]).hexdigest()


def test_a_missing_model_folder_is_refused(tmp_path: Path) -> None:
    line = refusal(tmp_path / "none", tmp_path)

    assert f"trainer cannot start: `--base-model` {tmp_path / 'none'} is no folder" in line


def test_an_engine_that_cannot_load_is_refused_with_its_reason(model: Path, tmp_path: Path) -> None:
    line = refusal(model, tmp_path, "--refusal", "`base_model` needs 9 GiB and 1 GiB is free")

    assert line.endswith("trainer cannot start: `--base-model` needs 9 GiB and 1 GiB is free")


def test_a_port_in_use_is_refused(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "port is in use" in refusal(model, tmp_path, "--address", address)
        assert "in use" in refusal(model, tmp_path, "--metrics-address", address)


def test_a_store_that_cannot_be_made_or_written_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")

    assert f"`--store` {tmp_path / 'store'} cannot be made: File exists" in refusal(model, tmp_path)


def test_a_missing_keys_file_is_refused(model: Path, tmp_path: Path) -> None:
    line = refusal(model, tmp_path, "--keys", str(tmp_path / "keys"))

    assert f"`--keys` file {tmp_path / 'keys'} cannot be read: No such file" in line


def test_a_ready_file_that_cannot_be_written_is_refused(model: Path, tmp_path: Path) -> None:
    line = refusal(model, tmp_path, "--ready-file", str(tmp_path / "none" / "ready"))

    assert "`--ready-file`" in line
    assert "cannot be written" in line


def test_keys_and_the_waiver_open_the_service_to_other_hosts(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    key = subprocess.run(
        [sys.executable, "-m", "mint_core.access.key_ring", "alice", str(keys)],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    ).stdout.strip()
    flags = ("--address", "0.0.0.0:0", "--keys", str(keys), "--allow-insecure")
    with running(model, tmp_path, *flags) as (_, addresses):
        port = addresses["address"].rpartition(":")[2]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = model_pb2_grpc.ModelServiceStub(channel)
            request = model_pb2.GetServerCapabilitiesRequest()
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetServerCapabilities(request)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            stub.GetServerCapabilities(request, metadata=[("authorization", f"Bearer {key}")])
    log = (tmp_path / "log").read_text()
    assert "tenant=alice code=OK" in log
    assert key not in log

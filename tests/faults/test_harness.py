"""Thirteen faults of `make faults`, and its parts: the proxy's faults."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.__main__ import hosting, run
from tests.harness.proxy import Proxy

LIMIT_S = 10.0
# The rest of the kinds come by chance in `make faults`.
FAULTS = (
    "cut",
    "restore",  # early: what is left of the scripts must save what both timelines save
    "delay",
    "full_store",
    "client",
    "delete",
    "damage",
    "held_store",
    "duplicate",
    "replica",
    "renew_group",
    "renew_replica",
    "engine",
)


def test_thirteen_faults_lose_and_repeat_nothing(qwen3_folder: Path, tmp_path: Path) -> None:
    report = run(tmp_path, qwen3_folder, kills=1, seed=1, steps=5, gap=1000, first=FAULTS)

    assert report.problems == []
    assert report.rounds == 1
    assert report.kills.total() >= 5  # what dies by itself meanwhile cannot be killed
    assert report.calls > 90
    assert report.crossings  # the abandoned timeline has saved what was saved again


@pytest.mark.ray
def test_faults_on_ray_lose_and_repeat_nothing(qwen3_folder: Path, tmp_path: Path) -> None:
    with hosting(tmp_path, "ray") as where:
        first = (*FAULTS, "node")
        report = run(tmp_path, qwen3_folder, 1, 1, steps=5, gap=1000, first=first, hosting=where)

    assert report.problems == []
    assert report.kills["nodes"] >= 1
    assert report.kills.total() >= 5


class Recorder(socketserver.ThreadingTCPServer):
    """Sends back what it gets, and keeps it by connection."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.changed = threading.Condition()
        super().__init__(("127.0.0.1", 0), _Handler)

    def await_heard(self, wanted: list[bytes]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: sorted(self.heard) == wanted, LIMIT_S), self.heard


class _Handler(socketserver.BaseRequestHandler):
    server: Recorder

    def handle(self) -> None:
        content = self.request.recv(100)
        with self.server.changed:
            self.server.heard.append(content)
            self.server.changed.notify_all()
        self.request.sendall(content.upper())
        self.request.recv(100)


@pytest.fixture
def server() -> Iterator[Recorder]:
    with Recorder() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def proxy(server: Recorder) -> Iterator[Proxy]:
    made = Proxy(f"127.0.0.1:{server.server_address[1]}")
    yield made
    made.close()


def connection(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), LIMIT_S)


def test_the_proxy_passes_on(server: Recorder, proxy: Proxy) -> None:
    with connection(proxy) as made:
        made.sendall(b"word")
        assert made.recv(100) == b"WORD"
    server.await_heard([b"word"])


def test_the_proxy_duplicates_and_answers_once(server: Recorder, proxy: Proxy) -> None:
    proxy.duplicating = True
    with connection(proxy) as made:
        made.sendall(b"word")
        assert made.recv(100) == b"WORD"
        server.await_heard([b"word", b"word"])
        made.settimeout(0.2)
        with pytest.raises(TimeoutError):
            made.recv(100)


def test_the_proxy_cuts(server: Recorder, proxy: Proxy) -> None:
    with connection(proxy) as made:
        made.sendall(b"word")
        assert made.recv(100) == b"WORD"
        proxy.cut()
        with suppress(ConnectionResetError):  # or the end: it is gone in either way
            assert not made.recv(100)

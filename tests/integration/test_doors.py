"""Who comes with what lets nobody in, and who comes and says nothing."""

import asyncio
import itertools
import socket
import ssl
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from cryptography import x509

from mint_core.access.key_ring import KeyRing
from mint_core.access.tls import Tls
from mint_core.rpc import hosting, interceptors, metrics_http
from mint_core.rpc.metrics import Metrics
from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc
from tests.authorities import Authority
from tests.hosted import LIMIT_S, RUN, reason, refused, serving
from tests.hostile.doors import PREFACE, PSEUDO, USUAL, call
from tests.keys import make_key


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


async def test_a_call_carries_one_key(tmp_path: Path) -> None:
    """Whoever stands in between, and looks at the other, would let it through."""
    ada, bob = (make_key(name, tmp_path / "keys") for name in ("ada", "bob"))
    forms = {
        ada: [("x-api-key", ada), ("authorization", f"Bearer {ada}")],
        bob: [("x-api-key", bob), ("authorization", f"Bearer {bob}")],
    }
    async with serving(KeyRing(tmp_path / "keys")) as served:
        for pair in itertools.product(forms[ada], repeat=2):
            answer = await served.stub.GetTrainingRun(RUN, metadata=pair)
            assert answer.training_run.training_run_id == "ada"
        for one, other in itertools.product(forms[ada], forms[bob]):
            for pair in ((one, other), (other, one)):
                error = await refused(served.stub.GetTrainingRun(RUN, metadata=pair))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "carries 2 API keys; send one" in str(error.details())
        basic = [("authorization", "Basic YWRhOnNlY3JldA=="), ("x-api-key", ada)]  # a proxy's own
        assert await served.stub.GetTrainingRun(RUN, metadata=basic)


async def test_a_key_that_expires_ends_what_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "CHECK_S", 0.05)
    monkeypatch.setattr(interceptors, "EXPIRY_CHECK_S", 0.05)
    key = make_key("ada", tmp_path / "keys", expires=datetime.now(UTC) + timedelta(seconds=4))
    async with serving(KeyRing(tmp_path / "keys")) as served:
        checking = asyncio.create_task(served.server.keep_checking())
        request = trainer_pb2.WatchTrainingRunRequest()
        watch = served.stub.WatchTrainingRun(request, metadata=[("x-api-key", key)])
        await watch.read()
        ended = await refused(watch.read())
        assert reason(ended)[0] == "UNAUTHENTICATED"
        assert "expired on" in str(ended.details())
        checking.cancel()


async def test_a_call_whose_request_does_not_come_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "CHECK_S", 0.05)
    monkeypatch.setattr(interceptors, "BODY_S", 0.1)
    key = make_key("ada", tmp_path / "keys")
    async with serving(KeyRing(tmp_path / "keys")) as served:
        checking = asyncio.create_task(served.server.keep_checking())
        silent = served.channel.stream_unary("/mintrpc.v1.TrainerService/GetTrainingRun")
        error = await refused(silent(metadata=[("x-api-key", key)]))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "the request has not come within 0.1 s" in str(error.details())
        checking.cancel()


def test_only_so_many_read_metrics_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a thread and a descriptor of the service, whether he asks for anything or not."""
    monkeypatch.setattr(metrics_http, "MOST_READERS", 3)
    port = Metrics().serve("127.0.0.1:0")
    with ExitStack() as silent:
        for _ in range(3):
            silent.enter_context(socket.create_connection(("127.0.0.1", port), LIMIT_S))
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), LIMIT_S) as more:
                assert more.recv(1) == b""
    assert b"mint_queue_depth" in read_when_there_is_a_place(port)


def read_when_there_is_a_place(port: int) -> bytes:
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_S) as answer:
                return bytes(answer.read())
        except (OSError, HTTPException):  # those who have left are still there
            assert time.monotonic() < deadline
            time.sleep(0.05)


async def test_a_path_that_is_no_text_ends_no_server(tmp_path: Path) -> None:
    """Of gRPC's asyncio server, it does: another takes its place, and callers come again."""
    make_key("ada", tmp_path / "keys")
    async with serving(KeyRing(tmp_path / "keys")) as served:
        usual = [(n, b"\xff\xfe" if n == b":path" else v) for n, v in (*PSEUDO, *USUAL)]
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(PREFACE + call(usual=usual))
            with suppress(OSError):
                await reader.read()  # until it is gone
            writer.close()
            error = await refused(served.stub.GetTrainingRun(RUN, wait_for_ready=True))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED


NAMES = x509.SubjectAlternativeName.oid
ODD: dict[str, list[x509.ExtensionType]] = {
    "none": [],
    "two": [x509.SubjectAlternativeName([x509.DNSName("ada"), x509.DNSName("bob")])],
    "any": [x509.SubjectAlternativeName([x509.DNSName("*.ada")])],
    "long": [x509.SubjectAlternativeName([x509.DNSName("a" * 65)])],
    "mail": [x509.SubjectAlternativeName([x509.RFC822Name("ada@ada.example")])],
    "zero": [x509.UnrecognizedExtension(NAMES, b"\x30\x0a\x82\x08ada\0.bob")],
    "empty": [x509.UnrecognizedExtension(NAMES, b"\x30\x00")],
    "nonsense": [x509.UnrecognizedExtension(NAMES, b"\xff\x00nonsense")],
}


@pytest.mark.parametrize("kind", ODD)
async def test_a_certificate_that_does_not_name_one_tenant_names_none(
    ca: Authority, kind: str
) -> None:
    cert, key = ca.issue_odd("odd", *ODD[kind])
    tls = Tls(*ca.issue("server", "localhost"), ca.file)
    files = ca.file.read_bytes(), key.read_bytes(), cert.read_bytes()
    credentials = grpc.ssl_channel_credentials(*files)
    async with (
        serving(tls=tls) as served,
        grpc.aio.secure_channel(f"localhost:{served.port}", credentials) as channel,
    ):
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        error = await refused(stub.GetTrainingRun(RUN, timeout=LIMIT_S))
    if error.code() is not grpc.StatusCode.UNAVAILABLE:  # gRPC has refused what it cannot read
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "takes the only one of them as the tenant" in str(error.details())


@pytest.mark.parametrize("secured", [False, True])
async def test_a_connection_that_does_not_get_on_is_cut_off(
    ca: Authority, monkeypatch: pytest.MonkeyPatch, secured: bool
) -> None:
    """Silent, or in the middle of a handshake, or behind that of TLS."""
    monkeypatch.setattr(hosting, "HANDSHAKE_S", 0.5)
    tls = Tls(*ca.issue("server", "localhost"), None) if secured else None
    context = ssl.create_default_context(cafile=ca.file)
    context.set_alpn_protocols(["h2"])
    async with serving(tls=tls) as served:
        address = "localhost", served.port
        connections = [await asyncio.open_connection(*address) for _ in range(2)]
        connections[1][1].write(b"\x16\x03\x01" if secured else b"PRI * HT")
        if secured:
            connections.append(await asyncio.open_connection(*address, ssl=context))
        for reader, writer in connections:
            with suppress(OSError):  # an end, too
                await reader.read()
            writer.close()

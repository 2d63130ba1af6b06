"""A real server that speaks TLS, and whom it lets in."""

import asyncio
import os
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import grpc
import pytest

from mint_core.access.key_ring import KeyRing
from mint_core.access.scopes import TenantBy
from mint_core.access.tls import Tls
from mint_core.errors import FailedPrecondition
from mint_core.rpc import interceptors
from mint_core.rpc.metrics import Metrics
from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc
from tests.authorities import Authority
from tests.hosted import LIMIT_S, RUN, reason, refused, serving
from tests.keys import make_key

SERVER = ("server", "localhost", "127.0.0.1")
WATCH = trainer_pb2.WatchTrainingRunRequest()


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@asynccontextmanager
async def calling(
    port: int, ca: Authority, cert: tuple[Path, Path] | None = None
) -> AsyncIterator[trainer_pb2_grpc.TrainerServiceStub]:
    pair = [file.read_bytes() for file in reversed(cert)] if cert else [None, None]
    credentials = grpc.ssl_channel_credentials(ca.file.read_bytes(), *pair)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        yield trainer_pb2_grpc.TrainerServiceStub(channel)


async def tenant(stub: trainer_pb2_grpc.TrainerServiceStub, key: str = "") -> str:
    metadata = [("x-api-key", key)] if key else []
    answer = await stub.GetTrainingRun(RUN, metadata=metadata, timeout=LIMIT_S)
    return answer.training_run.training_run_id


async def test_tls_alone_asks_nobody_who_he_is(ca: Authority) -> None:
    async with serving(tls=Tls(*ca.issue(*SERVER), None)) as served, calling(served.port, ca) as at:
        assert await tenant(at) == "default"
        plain = await refused(served.stub.GetTrainingRun(RUN, timeout=LIMIT_S))
    assert plain.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stranger_does_not_come_in(ca: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    tls = Tls(*ca.issue(*SERVER), ca.file)
    async with serving(tls=tls) as served:
        for cert in (None, other.issue("ada")):
            async with calling(served.port, ca, cert) as at:
                error = await refused(at.GetTrainingRun(RUN, timeout=LIMIT_S))
                assert error.code() is grpc.StatusCode.UNAVAILABLE
        async with calling(served.port, ca, ca.issue("ada")) as at:
            assert await tenant(at) == "ada"


@pytest.mark.parametrize(
    ("tenant_by", "expected"),
    [
        ("auto", {"ada": "ada", "bob": "bob"}),
        ("key", {"ada": "ada", "bob": "bob"}),
        ("certificate", {"ada": "ada", "bob": "ada"}),
        ("both", {"ada": "ada", "bob": ""}),
    ],
)
async def test_key_certificate_or_both_name_the_tenant(
    ca: Authority, tmp_path: Path, tenant_by: TenantBy, expected: dict[str, str]
) -> None:
    keys = {name: make_key(name, tmp_path / "keys") for name in ("ada", "bob")}
    tls = Tls(*ca.issue(*SERVER), ca.file)
    async with (
        serving(KeyRing(tmp_path / "keys"), tls, tenant_by=tenant_by) as served,
        calling(served.port, ca, ca.issue("ada")) as at,
    ):
        for name, key in keys.items():
            if expected[name]:
                assert await tenant(at, key) == expected[name]
                continue
            error = await refused(at.GetTrainingRun(RUN, metadata=[("x-api-key", key)]))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "of tenant ada, and the API key of bob" in str(error.details())


async def test_a_certificate_without_one_dns_name_is_no_tenant(ca: Authority) -> None:
    tls = Tls(*ca.issue(*SERVER), ca.file)
    async with (
        serving(tls=tls) as served,
        calling(served.port, ca, ca.issue("two", "ada", "bob")) as at,
    ):
        error = await refused(at.GetTrainingRun(RUN))
    assert "has 2 DNS names" in str(error.details())


async def test_what_is_replaced_holds_for_calls_and_streams_that_are_there(
    ca: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server certificate and client authority, and a key, while connections stay."""
    monkeypatch.setattr(interceptors, "CHECK_S", 0.05)
    key = make_key("ada", tmp_path / "keys")
    cas = tmp_path / "cas.pem"
    shutil.copy(ca.file, cas)
    tls = Tls(*ca.issue(*SERVER), cas)
    later = Authority(tmp_path / "later")
    old, new = ca.issue("ada"), later.issue("ada")
    async with serving(KeyRing(tmp_path / "keys"), tls, tenant_by="both") as served:
        checking = asyncio.create_task(served.server.keep_checking())
        async with calling(served.port, ca, old) as at:
            watch = at.WatchTrainingRun(WATCH, metadata=[("x-api-key", key)])
            await watch.read()
            expires = tls.expires_s()
            ca.issue(*SERVER, expires=datetime.now(UTC) + timedelta(days=2))
            cas.write_bytes(ca.file.read_bytes() + later.file.read_bytes())
            async with calling(served.port, ca, new) as beside:
                assert await tenant(beside, key) == "ada"
                assert tls.expires_s() < expires
                assert await tenant(at, key) == "ada"
                assert not watch.done()

                shutil.copy(later.file, cas)  # the old authority is revoked
                ended = await refused(watch.read())
                assert reason(ended)[0] == "UNAUTHENTICATED"
                assert "of no authority" in str(ended.details())
                again = await refused(at.GetTrainingRun(RUN, metadata=[("x-api-key", key)]))
                assert reason(again)[0] == "UNAUTHENTICATED"

                watch = beside.WatchTrainingRun(WATCH, metadata=[("x-api-key", key)])
                await watch.read()
                (tmp_path / "keys").write_text("")
                ended = await refused(watch.read())
                assert "key is not known" in str(ended.details())
        checking.cancel()


async def test_half_of_a_new_pair_changes_nothing(ca: Authority) -> None:
    cert, key = ca.issue(*SERVER)
    tls = Tls(cert, key, None)
    before = key.read_bytes()
    ca.issue(*SERVER)
    after = key.read_bytes()
    key.write_bytes(before)  # the new certificate beside the old key
    async with serving(tls=tls) as served:
        async with calling(served.port, ca) as at:
            assert await tenant(at) == "default"
        key.write_bytes(after)
        async with calling(served.port, ca) as at:
            assert await tenant(at) == "default"


async def test_an_expired_client_is_told(ca: Authority) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    tls = Tls(*ca.issue(*SERVER), ca.file)
    async with (
        serving(tls=tls) as served,
        calling(served.port, ca, ca.issue("ada", expires=soon)) as at,
    ):
        assert await tenant(at) == "ada"
        while datetime.now(UTC) < soon + timedelta(seconds=1):
            await asyncio.sleep(0.1)
        error = await refused(at.GetTrainingRun(RUN))
    assert "has expired" in str(error.details())


def test_bad_files_are_refused_by_their_option(ca: Authority, tmp_path: Path) -> None:
    cert, key = ca.issue(*SERVER)
    _, other_key = ca.issue("other")
    expired = ca.issue("expired", expires=datetime.now(UTC) - timedelta(days=1))
    text = tmp_path / "text"
    text.write_text("no certificate")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for files, message in [
        ((tmp_path / "none", key, None), "`tls_cert` .*: No such file"),
        ((pipe, key, None), "`tls_cert` .*: it is no regular file"),
        ((text, key, None), "`tls_cert` .* holds no certificates"),
        ((cert, other_key, None), "`tls_key` .* is not the private key"),
        ((cert, text, None), "`tls_key` .* is not the private key"),
        ((cert, key, text), "`client_ca` .* holds no certificates"),
        ((*expired, None), "`tls_cert` .* expired"),
    ]:
        with pytest.raises(FailedPrecondition, match=message):
            Tls(*files)


def test_metrics_are_read_over_tls(ca: Authority) -> None:
    cert, key = ca.issue(*SERVER)
    port = Metrics().serve("127.0.0.1:0", Tls(cert, key, ca.file).context)
    context = ssl.create_default_context(cafile=ca.file)
    with pytest.raises((URLError, ssl.SSLError, ConnectionError)):  # without a certificate
        urlopen(f"https://localhost:{port}/metrics", context=context, timeout=LIMIT_S)
    context.load_cert_chain(*ca.issue("prometheus"))
    with urlopen(f"https://localhost:{port}/metrics", context=context, timeout=LIMIT_S) as answer:
        assert b"mint_queue_depth" in answer.read()
    with pytest.raises((URLError, ConnectionError)):
        urlopen(f"http://localhost:{port}/metrics", timeout=LIMIT_S)

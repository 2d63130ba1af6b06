"""The client by TLS, and in what words it says that it cannot."""

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

import mint
from tests.authorities import Authority
from tests.keys import make_key
from tests.servers import RunningService, running_summing_trainer

SERVER = ("server", "localhost")
VARIABLES = ("CA", "CERT", "KEY")


class Site:
    """Servers of one authority: `plain`, `tls` (with keys) and `mutual` (by certificate)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = Authority(folder / "ca")
        self.key = make_key("ann", folder / "keys")
        self.servers: dict[str, RunningService] = {}

    def port(self, name: str) -> str:
        return self.servers[name].address.rpartition(":")[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    cert, key = site.ca.issue(*SERVER)
    tls = {"tls_cert": cert, "tls_key": key}
    (site.folder / "plain").mkdir()
    (site.folder / "tls").mkdir()
    (site.folder / "mutual").mkdir()
    with (
        running_summing_trainer(site.folder / "plain") as plain,
        running_summing_trainer(site.folder / "tls", **tls, keys=site.folder / "keys") as secured,
        running_summing_trainer(site.folder / "mutual", **tls, client_ca=site.ca.file) as mutual,
    ):
        site.servers = {"plain": plain, "tls": secured, "mutual": mutual}
        yield site


@pytest.fixture
def environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """That of a client which trusts the authority and has no certificate."""
    for name in VARIABLES:
        monkeypatch.delenv(f"MINT_TLS_{name}", raising=False)
    monkeypatch.delenv("MINT_API_KEY", raising=False)
    monkeypatch.setenv("MINT_TLS_CA", str(site.ca.file))
    return monkeypatch


def show(environment: pytest.MonkeyPatch, pair: tuple[Path, Path]) -> None:
    environment.setenv("MINT_TLS_CERT", str(pair[0]))
    environment.setenv("MINT_TLS_KEY", str(pair[1]))


def trained(url: str, key: str | None = None) -> int:
    with mint.ServiceClient(base_url=url, api_key=key, timeout=20) as service:
        run = service.create_lora_training_client(rank=1)
        datum = mint.types.Datum(
            model_input=mint.types.ModelInput.from_ints([1, 2]),
            loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 1.0]},
        )
        run.forward_backward([datum], "cross_entropy").result()
        run.optim_step(mint.types.AdamParams()).result()
        return service.get_training_run(run.training_run_id).step


def refused(url: str, key: str | None = None) -> str:
    with (
        mint.ServiceClient(base_url=url, api_key=key, timeout=20) as service,
        pytest.raises(mint.APIConnectionError) as caught,
    ):
        service.get_server_capabilities()
    return str(caught.value)


def test_https_trains_with_a_key(site: Site, environment: pytest.MonkeyPatch) -> None:
    assert site.servers["tls"].address.startswith("https://127.0.0.1:")
    assert trained(f"https://localhost:{site.port('tls')}", site.key) == 1


def test_a_certificate_names_the_tenant(site: Site, environment: pytest.MonkeyPatch) -> None:
    show(environment, site.ca.issue("ann"))
    url = f"https://localhost:{site.port('mutual')}"
    assert trained(url) == 1
    with mint.ServiceClient(base_url=url) as ann:
        (run,) = ann.create_rest_client().list_training_runs().result().training_runs
    show(environment, site.ca.issue("bob"))
    with mint.ServiceClient(base_url=url) as bob:
        assert not bob.create_rest_client().list_training_runs().result().training_runs
        with pytest.raises(mint.NotFoundError):
            bob.open_training_run(run.training_run_id)


def test_what_keeps_them_apart_is_said_at_once(
    site: Site, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, tls, mutual = (site.port(name) for name in ("plain", "tls", "mutual"))
    assert "speaks without TLS; take http://" in refused(f"https://localhost:{plain}")
    assert "speaks TLS alone; take https://" in refused(f"http://localhost:{tls}", site.key)
    assert "is not for the name `127.0.0.1`" in refused(f"https://127.0.0.1:{tls}", site.key)
    assert "wants a certificate of the client" in refused(f"https://localhost:{mutual}")
    show(environment, Authority(tmp_path).issue("ann"))
    assert "does not take the client's certificate" in refused(f"https://localhost:{mutual}")
    environment.setenv("MINT_TLS_CA", str(Authority(tmp_path, "other").file))
    said = refused(f"https://localhost:{tls}", site.key)
    assert "is of no authority that this client trusts (those in MINT_TLS_CA" in said
    environment.delenv("MINT_TLS_CA")
    assert "(the well-known ones)" in refused(f"https://localhost:{tls}", site.key)


def test_the_metrics_port_says_who_speaks_what_where(
    site: Site, environment: pytest.MonkeyPatch
) -> None:
    """To HTTP itself, and to a client that was sent there."""
    context = ssl.create_default_context(cafile=site.ca.file)
    for name, scheme in (("plain", "http"), ("tls", "https")):
        metrics = f"{scheme}://localhost:{site.servers[name].metrics_address.rpartition(':')[2]}"
        with urlopen(metrics, context=context if scheme == "https" else None) as answer:
            sign = f"the trainer speaks gRPC, not HTTP/1, on port {site.port(name)}\n"
            assert answer.read().decode() == f"metrics are at /metrics; {sign}"
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{metrics}/else", context=context if scheme == "https" else None)
        assert "speaks HTTP/1 and no gRPC; give the port of a trainer (50051" in refused(metrics)
    plain = site.servers["plain"].metrics_address
    assert "speaks HTTP/1 and no gRPC" in refused(f"https://{plain}")


def test_an_expired_server_is_named(
    site: Site, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=6)
    cert, key = site.ca.issue("soon", "localhost", expires=soon)
    with running_summing_trainer(tmp_path, tls_cert=cert, tls_key=key) as service:
        while datetime.now(UTC) <= soon + timedelta(seconds=1):
            pass
        assert "has expired" in refused(f"https://localhost:{service.address.rpartition(':')[2]}")


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CA": "none"}, "MINT_TLS_CA.*No such file"),
        ({"CA": "text"}, "MINT_TLS_CA.*holds no certificates"),
        ({"CERT": "cert"}, "MINT_TLS_CERT.*go together"),
        ({"CERT": "cert", "KEY": "other"}, "MINT_TLS_KEY.*is not the private key"),
        ({"CERT": "cert", "KEY": "text"}, "MINT_TLS_KEY.*is not the private key"),
    ],
)
def test_bad_files_are_refused_before_anything_is_sent(
    site: Site,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    variables: dict[str, str],
    why: str,
) -> None:
    (tmp_path / "text").write_text("no certificate")
    files = {"none": tmp_path / "none", "text": tmp_path / "text"}
    files["cert"], _ = site.ca.issue("ann")
    _, files["other"] = site.ca.issue("bob")
    for name, file in variables.items():
        environment.setenv(f"MINT_TLS_{name}", str(files[file]))
    with pytest.raises(mint.APIError, match=why):
        mint.ServiceClient(base_url=f"https://localhost:{site.port('tls')}")


def test_a_key_does_not_leave_in_plaintext(site: Site, environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(mint.APIError, match=r"would cross the network readable to example\.org"):
        mint.ServiceClient(base_url="example.org:1", api_key=site.key)
    mint.ServiceClient(base_url="https://example.org:1", api_key=site.key).close()
    mint.ServiceClient(base_url="example.org:1").close()
    environment.setenv("MINT_ALLOW_INSECURE", "1")
    mint.ServiceClient(base_url="example.org:1", api_key=site.key).close()

"""What both services can be told."""

from pathlib import Path
from typing import Any

import pytest

from mint_core.addresses import host_and_port, is_loopback
from mint_core.hosting.service_config import ServiceConfig
from sampler_service.config import SamplerConfig
from trainer_service.config import TrainerConfig


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.168.0.1:1", "example.org:1"])
def test_other_hosts_are_answered_only_with_keys_and_tls_or_a_waiver(address: str) -> None:
    tls = {"tls_cert": Path("c"), "tls_key": Path("k")}
    with pytest.raises(ValueError, match=r"answers other hosts and so needs `keys` or `client_ca`"):
        ServiceConfig(base_model="m", address=address)
    with pytest.raises(ValueError, match=r"`address` .* needs TLS; give --tls-cert"):
        ServiceConfig(base_model="m", address=address, keys=Path("k"))
    with pytest.raises(ValueError, match=r"`metrics_address` .* needs TLS; give --tls-cert"):
        ServiceConfig(base_model="m", metrics_address=address, keys=Path("k"))
    with pytest.raises(ValueError, match=r"needs `keys`"):
        ServiceConfig(base_model="m", address=address, allow_insecure=True)
    with pytest.raises(ValueError, match=r"needs `keys`"):
        ServiceConfig(base_model="m", address=address, **tls)

    assert ServiceConfig(base_model="m", address=address, keys=Path("k"), allow_insecure=True)
    assert ServiceConfig(
        base_model="m", address=address, metrics_address=address, keys=Path("k"), **tls
    )
    assert ServiceConfig(base_model="m", address=address, client_ca=Path("a"), **tls)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tls_cert": Path("c")}, "`tls_cert` and `tls_key` go together"),
        ({"tls_key": Path("c")}, "`tls_cert` and `tls_key` go together"),
        ({"client_ca": Path("c")}, "`client_ca` is of no use without TLS"),
        ({"tenant_by": "certificate"}, "`tenant_by` certificate needs `client_ca`"),
        ({"tenant_by": "both", "keys": Path("k")}, "`tenant_by` both needs `client_ca`"),
        ({"tenant_by": "key"}, "`tenant_by` key needs `keys`"),
    ],
)
def test_what_goes_together_is_given_together(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ServiceConfig(base_model="m", **given)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("h:0", ("h", 0)), ("[::1]:50051", ("::1", 50051)), ("1.2.3.4:65535", ("1.2.3.4", 65535))],
)
def test_addresses_are_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert host_and_port(address, "address") == parts


@pytest.mark.parametrize("address", ["", "h", "h:", ":1", "h:65536", "h:-1", "h:1x", "http://h"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="`address` must look like HOST:PORT"):
        host_and_port(address, "address")


@pytest.mark.parametrize("kind", [TrainerConfig, SamplerConfig])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_number_is_finite_and_not_below_its_least(
    kind: type[ServiceConfig], value: float
) -> None:
    for name in ("state_quota_gib", "store_quota_gib", "snapshot_s", "max_wait_s"):
        if hasattr(kind, name):
            with pytest.raises(ValueError, match=f"`{name}` must be"):
                kind(**{name: value})  # type: ignore[arg-type]

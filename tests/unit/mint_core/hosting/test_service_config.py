"""What both services can be told."""

import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mint_core.addresses import host_and_port, is_loopback
from mint_core.engine_host.carried import NO_FILES
from mint_core.errors import FailedPrecondition
from mint_core.hosting.engine_hosts import engine_hosts
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


RAY = {"engines_on": "ray"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"ray_gpus": 1.0}, "`ray_gpus` is for engines on Ray; give --engines-on ray"),
        ({"ray_folder": Path("f")}, "`ray_folder` is for engines on Ray"),
        ({**RAY, "ray_cpus": -1.0}, "`ray_cpus` must be at least 0"),
        ({**RAY, "ray_cpus": 0.0}, "`ray_cpus` and `ray_gpus` are both 0"),
        ({**RAY, "device": "cuda"}, "`device` cuda needs `ray_gpus`; give --ray-gpus 1"),
        ({**RAY, "ray_listen": "here"}, "`ray_listen` must look like HOST:PORT"),
        ({**RAY, "ray_address": "here"}, "`ray_address` must look like HOST:PORT"),
    ],
)
def test_options_of_ray_are_for_engines_on_ray(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ServiceConfig(base_model="m", **given)


def test_engines_on_ray_may_have_no_cpu_and_half_a_gpu() -> None:
    assert ServiceConfig(base_model="m", ray_cpus=0.0, ray_gpus=0.5, **RAY)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_its_option_is_refused_with_what_installs_it() -> None:
    config = ServiceConfig(base_model="m", engines_on="ray")
    with pytest.raises(FailedPrecondition, match=r"pip install 'mintrpc\[server,ray\]'"):
        engine_hosts(config, lambda job: NO_FILES, [])


DEPLOY = Path(__file__).parents[4] / "deploy"


@pytest.mark.parametrize("file", ["ray-cluster.yaml", "kuberay.yaml"])
def test_the_examples_of_clusters_give_options_that_there_are(file: str) -> None:
    _, _, command = (DEPLOY / file).read_text().partition("mint_core.hosting.serve")
    known = {field.name for kind in (TrainerConfig, SamplerConfig) for field in fields(kind)}
    known |= {"trainer_address", "sampler_address"}
    given = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", command)}
    assert {"engines_on", "ray_gpus", "ray_folder"} <= given <= known


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

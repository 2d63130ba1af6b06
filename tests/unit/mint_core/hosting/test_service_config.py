"""Configurations and the flags made from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mint_core.addresses import host_and_port, is_loopback
from mint_core.hosting.service_config import (
    ServiceConfig,
    option,
    parse_flags,
    required,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ServiceConfig):
    address: str = option("127.0.0.1:7", "where")
    budget: float = option(0.5, "how much, in % of all")
    mode: Literal["fast", "slow"] = option("fast", "how")

    def __post_init__(self) -> None:
        ServiceConfig.__post_init__(self)
        if self.budget > 1:
            raise ValueError(f"`budget` must be at most 1, got {self.budget}")


@dataclass(frozen=True, slots=True)
class Small:
    name: str = required("a name")


def parse(*argv: str) -> Config:
    return parse_flags(Config, ["--base-model", "m", *argv], program="p", summary="Does.")


def test_defaults_are_the_fields() -> None:
    assert parse() == Config(base_model="m")
    assert parse().address == "127.0.0.1:7"
    assert parse().threads == 1


def test_flags_are_the_fields_with_their_types() -> None:
    config = parse(
        *("--store", "a/b", "--threads", "2", "--budget", "0.25", "--mode", "slow"),
        *("--keys", "k", "--allow-insecure", "--address", "0.0.0.0:1"),
    )

    assert config.store == "a/b"
    assert (config.threads, config.budget, config.mode) == (2, 0.25, "slow")
    assert (config.keys, config.allow_insecure) == (Path("k"), True)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--thread", "2"], "unrecognized arguments: --thread 2"),
        (["--threads", "two"], "argument --threads: invalid int value: 'two'"),
        (["--mode", "medium"], "argument --mode: invalid choice: 'medium'"),
        (["--threads", "0"], "`threads` must be at least 1, got 0"),
        (["--max-lora-rank", "0"], "`max_lora_rank` must be at least 1, got 0"),
        (["--keys", ""], "argument --keys: is empty; leave the flag out for the default"),
        (["--store", ""], "`store` is empty; give a folder"),
        (["--budget", "2"], "`budget` must be at most 1, got 2.0"),
        (["--address", "localhost"], "`address` must look like HOST:PORT, got 'localhost'"),
        (["--metrics-address", ":9"], "`metrics_address` must look like HOST:PORT, got ':9'"),
    ],
)
def test_a_bad_flag_is_refused_with_its_name(
    argv: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)

    assert caught.value.code == 2
    assert f"p: error: {why}" in capsys.readouterr().err


def test_a_required_flag_is_demanded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags(Small, [], program="p", summary="Does.")

    assert "required: --name" in capsys.readouterr().err


def test_help_tells_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")

    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "--budget FLOAT how much, in % of all (default: 0.5)" in shown
    assert "--base-model TEXT folder or hub id of the base model (required)" in shown
    assert "--mode {fast,slow} how (default: fast)" in shown


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.168.0.1:1", "example.org:1"])
def test_other_hosts_are_answered_only_with_keys_and_tls_or_a_waiver(address: str) -> None:
    tls = {"tls_cert": Path("c"), "tls_key": Path("k")}
    with pytest.raises(ValueError, match=r"answers other hosts and so needs `keys` or `client_ca`"):
        Config(base_model="m", address=address)
    with pytest.raises(ValueError, match=r"`address` .* needs TLS; give --tls-cert"):
        Config(base_model="m", address=address, keys=Path("k"))
    with pytest.raises(ValueError, match=r"`metrics_address` .* needs TLS; give --tls-cert"):
        Config(base_model="m", metrics_address=address, keys=Path("k"))
    with pytest.raises(ValueError, match=r"needs `keys`"):
        Config(base_model="m", address=address, allow_insecure=True)
    with pytest.raises(ValueError, match=r"needs `keys`"):
        Config(base_model="m", address=address, **tls)

    assert Config(base_model="m", address=address, keys=Path("k"), allow_insecure=True)
    assert Config(base_model="m", address=address, metrics_address=address, keys=Path("k"), **tls)
    assert Config(base_model="m", address=address, client_ca=Path("a"), **tls)


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
        Config(base_model="m", **given)


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

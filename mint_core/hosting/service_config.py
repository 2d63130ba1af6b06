"""What both services can be told, and command lines made from such dataclasses."""

import argparse
import dataclasses
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mint_core.addresses import host_and_port, is_loopback
from mint_core.rpc.door import TenantBy

C = TypeVar("C")


def option(default: Any, help: str) -> Any:
    """A field of a configuration: its default and what `--help` says of it."""
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A field of a configuration that has no default."""
    return field(metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Base of a service's configuration, which has its own default addresses.

    A subclass with a `__post_init__` calls `ServiceConfig.__post_init__(self)` in it.
    """

    base_model: str = required("folder or hub id of the base model")
    base_model_name: str = option(
        "", "name under which it is served; empty: the hub id, or the folder's name"
    )
    store: str = option(
        ".store",
        "the checkpoint store, the same for trainer and sampler: a folder, or "
        "s3://BUCKET/PREFIX with ?endpoint=URL&region=NAME where it is not Amazon's; credentials "
        "come from the environment (AWS_ACCESS_KEY_ID and so on)",
    )
    local_folder: Path | None = option(
        None,
        "folder, on a local disk, for what lies beside a store in an object store: copies of its "
        "files, rows, the trainer's state; empty: `.store`",
    )
    snapshot_memory_folder: Path | None = option(
        None,
        "folder in memory (a tmpfs) in which the trainer hands snapshots to samplers of its host, "
        "the same for both; this user alone may enter it. Empty: one in /dev/shm, by the store's "
        "path",
    )
    address: str = option("127.0.0.1:0", "HOST:PORT to listen on; port 0: one that is free")
    metrics_address: str = option(
        "127.0.0.1:0", "HOST:PORT of the Prometheus metrics; port 0: one that is free; empty: none"
    )
    device: str = option("auto", "cpu, cuda, cuda:N or auto")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "type in which the base computes"
    )
    threads: int = option(
        1, "threads of the engine on a CPU; with more than 1, results are not bitwise reproducible"
    )
    max_lora_rank: int = option(128, "largest LoRA rank")
    keys: Path | None = option(
        None,
        "file of hashed API keys, one `HASH TENANT` a line; `make key` adds to it. A number after "
        "the tenant is its weight in the trainer's fair shares (0.01 to 100, default 1)",
    )
    quotas: Path | None = option(
        None,
        "TOML file of what one tenant may have at the same time, such as `runs = 500`; under "
        "[tenant.NAME], what a certain one may; docs/security.md has all names and defaults",
    )
    tls_cert: Path | None = option(
        None,
        "file of the service's certificate, in PEM, with those between it and its authority: then "
        "it speaks TLS alone, on the port of the metrics too. This file and the two below are read "
        "again when they change",
    )
    tls_key: Path | None = option(None, "file of its private key, in PEM, without a password")
    client_ca: Path | None = option(
        None,
        "file of the authorities, in PEM, one of which must have issued the certificate of each "
        "client",
    )
    tenant_by: TenantBy = option(
        "auto",
        "what says which tenant a caller is: its key, its certificate (by its only DNS name), or "
        "both, which must agree; auto: the key if there are `keys`, else the certificate",
    )
    audit_log: Path | None = option(
        None,
        "file to which each call that changes something adds a line of JSON: who, what, when, and "
        "what came of it; opened anew when it has been moved away",
    )
    allow_insecure: bool = option(
        False, "answer other hosts without TLS, so that keys and data cross the network readable"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option(
        "INFO", "least level that is logged"
    )
    ready_file: Path | None = option(
        None, "file to write, as JSON, the addresses to once the service is ready"
    )

    def __post_init__(self) -> None:
        self.require_at_least(1, "threads", "max_lora_rank")
        if not self.store:
            raise ValueError("`store` is empty; give a folder, or leave it out for the default")
        if self.local_folder is not None and not self.store_is_remote:
            raise ValueError(
                "`local_folder` is for what lies beside an object store, and `store` "
                f"{self.store} is a folder; leave it out"
            )
        self._check_tls()
        for name in ("address", "metrics_address"):
            address = getattr(self, name)
            if not address and name == "metrics_address":
                continue
            host, _ = host_and_port(address, name)
            if not is_loopback(host):
                self._check_open(name, address)

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("`tls_cert` and `tls_key` go together; give both, or neither")
        if self.client_ca is not None and self.tls_cert is None:
            raise ValueError("`client_ca` is of no use without TLS; give `tls_cert` and `tls_key`")
        if self.tenant_by in ("certificate", "both") and self.client_ca is None:
            raise ValueError(f"`tenant_by` {self.tenant_by} needs `client_ca`; give --client-ca")
        if self.tenant_by in ("key", "both") and self.keys is None:
            raise ValueError(f"`tenant_by` {self.tenant_by} needs `keys`; give --keys")

    def _check_open(self, name: str, address: str) -> None:
        """Refuses to answer other hosts without what keeps strangers out."""
        if name == "address" and self.keys is None and self.client_ca is None:
            raise ValueError(
                f"`address` {address} answers other hosts and so needs `keys` or `client_ca`; "
                "give --keys FILE, or a loopback address"
            )
        if self.tls_cert is None and not self.allow_insecure:
            raise ValueError(
                f"`{name}` {address} answers other hosts and so needs TLS; give --tls-cert and "
                "--tls-key, a loopback address, or --allow-insecure, which lets keys and data "
                "cross the network readable"
            )

    def require_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")

    @property
    def store_is_remote(self) -> bool:
        """Whether the store is no folder."""
        return "://" in self.store

    @property
    def store_folder(self) -> Path:
        """The folder on this host: the store, or what lies beside it."""
        if self.store_is_remote:
            return self.local_folder or Path(".store")
        return Path(self.store)


def parse_flags(config: type[C], argv: Sequence[str], *, program: str, summary: str) -> C:
    """Makes a configuration from flags named after its fields; a bad one exits with status 2."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=summary,
        allow_abbrev=False,
    )
    hints = get_type_hints(config)
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass, though C does not say so
        _add_flag(parser, entry, hints[entry.name])
    values = vars(parser.parse_args(argv))
    try:
        return config(**values)
    except ValueError as error:
        parser.error(str(error))


def _add_flag(parser: argparse.ArgumentParser, entry: "dataclasses.Field[Any]", hint: Any) -> None:
    flag = "--" + entry.name.replace("_", "-")
    needed = entry.default is dataclasses.MISSING
    settings: dict[str, Any] = {"required": needed, "help": _help(entry)}
    kind = _without_none(hint)
    if kind is bool:
        assert entry.default is False, "a switch is off unless it is given"
        settings |= {"action": "store_true"}
    elif get_origin(kind) is Literal:
        settings |= {"choices": get_args(kind)}
    else:
        convert = _path if kind is Path else kind
        settings |= {"type": convert, "metavar": "TEXT" if kind is str else kind.__name__.upper()}
    parser.add_argument(flag, default=None if needed else entry.default, **settings)


def _path(text: str) -> Path:
    if not text:  # `Path("")` is the folder in which the program was started
        raise argparse.ArgumentTypeError("is empty; leave the flag out for the default")
    return Path(text)


def _help(entry: "dataclasses.Field[Any]") -> str:
    if entry.default is dataclasses.MISSING:
        ending = " (required)"
    elif entry.default in (None, "", False):
        ending = ""
    else:
        ending = f" (default: {entry.default})"
    return str(entry.metadata["help"]).replace("%", "%%") + ending


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (kind,) = (arg for arg in get_args(hint) if arg is not type(None))
        return kind
    return hint

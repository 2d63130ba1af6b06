"""What both services can be told."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mint_core.access.scopes import TenantBy
from mint_core.addresses import host_and_port, is_loopback

EMBEDDED_MODEL = ".models/SmolLM2-135M-Instruct"  # what `make model` makes
ADDRESS = "HOST:PORT to listen on; port 0: one that is free"
METRICS_ADDRESS = "HOST:PORT of the Prometheus metrics; port 0: one that is free; empty: none"


def option(default: Any, help: str) -> Any:
    """A field of a configuration: its default and what `--help` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Base of a service's configuration, which has its own default addresses.

    A subclass with a `__post_init__` calls `ServiceConfig.__post_init__(self)` in it.
    """

    config: Path | None = option(None, "TOML file of options")
    base_model: str = option(EMBEDDED_MODEL, "folder or hub id of the base model")
    base_model_revision: str = option(
        "",
        "branch, tag or commit of a base model that comes from a hub; empty: its main branch. "
        "HF_HOME names the folder of its local cache, HF_HUB_OFFLINE=1 forbids to fetch anything, "
        "HF_TOKEN is the hub's key",
    )
    base_model_name: str = option(
        "", "name under which it is served; empty: the hub id, or the folder's name"
    )
    engines_on: Literal["processes", "ray"] = option(
        "processes",
        "where engines run: as processes of this machine, or as actors of a cluster of Ray, which "
        "this machine is of (docs/scale.md); the options `ray_...` are for the second",
    )
    ray_address: str = option("auto", "HOST:PORT of the cluster's head; auto: as this machine says")
    ray_listen: str = option(
        "",
        "HOST:PORT at which engines on other machines reach this service, by TLS with certificates "
        "of their own; empty: this machine's address in the cluster, and a port that is free",
    )
    ray_strategy: Literal["pack", "spread"] = option(
        "pack", "whether Ray puts a service's engines on as few machines as it can, or on as many"
    )
    ray_cpus: float = option(1.0, "CPUs that Ray keeps for each engine")
    ray_gpus: float = option(
        0.0, "GPUs that it keeps for each engine, which sees no others; 0.5: two of them share one"
    )
    ray_folder: Path | None = option(
        None,
        "folder, on a disk of each machine, for an engine's files and its copies of this "
        "service's; what is in it is of no use later and is removed. Empty: a temporary one, and "
        "none where the engine finds this service's own folders",
    )
    store: str = option(
        ".store",
        "the checkpoint store, the same for trainer and sampler: a folder, or "
        "s3://BUCKET/PREFIX with ?endpoint=URL&region=NAME where it is not Amazon's; credentials "
        "come from the environment (AWS_ACCESS_KEY_ID and so on); for a sampler also "
        "https://HOST:PORT of the trainer whose adapters it is to serve, with which it then shares "
        "nothing else",
    )
    local_folder: Path | None = option(
        None,
        "folder, on a local disk, for what lies beside a store that is no folder: copies of its "
        "files, rows, the trainer's state; empty: `.store`",
    )
    snapshot_memory_folder: Path | None = option(
        None,
        "folder in memory (a tmpfs) in which the trainer hands snapshots to samplers of its host, "
        "the same for both; this user alone may enter it. Empty: one in /dev/shm, by the store's "
        "path",
    )
    address: str = option("127.0.0.1:0", ADDRESS)
    metrics_address: str = option("127.0.0.1:0", METRICS_ADDRESS)
    device: str = option("auto", "cpu, cuda, cuda:N or auto")
    dtype: Literal["auto", "float32", "bfloat16", "float8"] = option(
        "auto",
        "type in which the base computes; float8: as auto, with the weights of its layers, but for "
        "embeddings and head, rounded to 8 bits (docs/models.md)",
    )
    adapters_across_dtypes: bool = option(
        False,
        "open adapters and training state made on this base with float8 weights where it is "
        "served without, and the other way round: by what float8 rounds they compute otherwise",
    )
    memory_share: float = option(
        0.0,
        "most of the device's memory that this service may take, as a share of all of it, such as "
        "0.5 where trainer and sampler are on one GPU; of the host's memory on a CPU. What is "
        "computed from free memory keeps within it. 0: as much as is free",
    )
    threads: int = option(
        1, "threads of the engine on a CPU; with more than 1, results are not bitwise reproducible"
    )
    trade_bits_for_speed: bool = option(
        False,
        "on a CPU, compute as the libraries are fastest, where otherwise each sequence's bits are "
        "its own: then its last bits, and at times the tokens of a seed, depend on who shares its "
        "passes, and on what was restored after a crash. Capabilities say so",
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
        False,
        "answer other hosts without TLS, and as a sampler ask a trainer so, so that keys and data "
        "cross the network readable",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option(
        "INFO", "least level that is logged"
    )
    ready_file: Path | None = option(
        None, "file to write, as JSON, the addresses to once the service is ready"
    )

    def __post_init__(self) -> None:
        self.require_at_least(1, "threads", "max_lora_rank")
        if not 0 <= self.memory_share <= 1:
            raise ValueError(f"`memory_share` must be from 0 to 1, got {self.memory_share}")
        if not self.store:
            raise ValueError("`store` is empty; give a folder, or leave it out for the default")
        if self.local_folder is not None and not self.store_is_remote:
            raise ValueError(
                "`local_folder` is for what lies beside a store that is no folder, and `store` "
                f"{self.store} is a folder; leave it out"
            )
        self._check_tls()
        self._check_ray()
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

    def _check_ray(self) -> None:
        if self.engines_on == "processes":
            for each in fields(self):
                if each.name.startswith("ray_") and getattr(self, each.name) != each.default:
                    raise ValueError(
                        f"`{each.name}` is for engines on Ray; give --engines-on ray, or leave "
                        "it out"
                    )
            return
        self.require_at_least(0, "ray_cpus", "ray_gpus")
        if not self.ray_cpus and not self.ray_gpus:
            raise ValueError("`ray_cpus` and `ray_gpus` are both 0; give what an engine needs")
        if self.device.startswith("cuda") and not self.ray_gpus:
            raise ValueError(f"`device` {self.device} needs `ray_gpus`; give --ray-gpus 1")
        if self.ray_listen:
            host_and_port(self.ray_listen, "ray_listen")
        if self.ray_address != "auto":
            host_and_port(self.ray_address, "ray_address")

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
            if not least <= getattr(self, name) < float("inf"):  # false of a NaN, too
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")

    @property
    def own_share(self) -> float:
        """The share of one engine."""
        return self.memory_share

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

"""What the sampler, its front and its engine, can be told."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from checkpoint_store import is_wire_address, snapshot_folder
from mint_core.hosting.service_config import ADDRESS, METRICS_ADDRESS, ServiceConfig, option
from sampler_service.jobs import CHUNK_TOKENS
from sampler_service.wire_store.access import TrainerAccess


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig(ServiceConfig):
    """Samples from one base model and from LoRA adapters on it, over gRPC."""

    address: str = option("127.0.0.1:50052", ADDRESS)
    metrics_address: str = option("127.0.0.1:9052", METRICS_ADDRESS)
    store_api_key: Path | None = option(
        None,
        "file that holds the API key for a `store` that is a trainer: one of scope `fetch`, or, "
        "where all callers are of one tenant, a key of that tenant of scope `read`. This file and "
        "the three below are read again when they change",
    )
    store_tls_ca: Path | None = option(
        None,
        "file of the authorities, in PEM, that the trainer's certificate may be of; empty: the "
        "well-known ones",
    )
    store_tls_cert: Path | None = option(
        None, "file of the sampler's own certificate, in PEM, where the trainer wants one"
    )
    store_tls_key: Path | None = option(None, "file of its private key, in PEM, without a password")
    replicas: int = option(
        1,
        "engines that share the requests, each with the whole base model. What options say of "
        "adapters, passes, samples and the cache is each one's; computed memory is divided",
    )
    devices: str = option(
        "",
        "the device of each of the `replicas`, as in cuda:0,cuda:1; empty: `device` for all",
    )
    max_adapters: int = option(64, "most adapters in the engine's memory at the same time")
    adapter_memory_mib: int = option(
        0,
        "memory for adapters, in MiB, at least for one of the largest rank; others wait in the "
        "store; 0: computed from free memory",
    )
    host_adapter_memory_mib: int = option(
        0,
        "memory of the host, in MiB, for adapters that make room for others on a GPU; 0: computed "
        "from free memory",
    )
    row_folder: Path | None = option(
        None,
        "folder, on a local disk, for copies of adapters in the form that the engine maps; what is "
        "in it is of no use to a later process and is removed by it; empty: `.rows` in the store, "
        "or in `local_folder`",
    )
    row_folder_mib: int = option(
        0,
        "most space, in MiB, that these copies take; others are made again from the store; 0: "
        "computed from free space",
    )
    max_running_samples: int = option(64, "most continuations that generate at the same time")
    max_batch_tokens: int = option(
        0, "most tokens of one pass; 0: one piece of a prompt beside all continuations"
    )
    batch_invariant: bool = option(
        False,
        "on a GPU, compute each sequence so that its bits do not depend on who shares its passes: "
        "a seed gives the same tokens on an idle and on a busy server. It takes longer, is tried "
        "at start, and is refused for models with parts that cannot (docs/models.md). On a CPU it "
        "is always so, and the option refuses to start where it is not",
    )
    kv_cache_tokens: int = option(
        0,
        "most tokens whose keys and values are kept; no context is longer. 0: on a GPU what memory "
        "holds; on a CPU what runs needs, up to 4 GiB or one context, and 1 GiB of what has run. "
        "What does not run goes back when the host is short of memory",
    )

    queue_samples: int = option(
        8192,
        "most continuations of one tenant (without `keys`: of all callers) that are accepted and "
        "not finished; more are told to come again, which clients do by themselves. All tenants "
        "together have 4 times as many",
    )
    queue_tokens: int = option(
        16_000_000,
        "the same in tokens of their prompts: a request is accepted while fewer than these are, of "
        "whatever size it is",
    )
    max_wait_s: float = option(
        0.0,
        "longest wait for the first pass, in seconds; a request whose turn does not come in it is "
        "ended with an error. 0: it waits for as long as its caller does",
    )

    def __post_init__(self) -> None:
        ServiceConfig.__post_init__(self)
        if self.trainer_access() is None:
            for name in ("store_api_key", "store_tls_ca", "store_tls_cert", "store_tls_key"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is for a trainer's address, and `store` {self.store} is none; "
                        "leave it out"
                    )
        elif self.snapshot_memory_folder is not None:
            raise ValueError(
                "`snapshot_memory_folder` is for a store that this host shares with the trainer, "
                f"and `store` {self.store} is the trainer's address; leave it out"
            )
        self.require_at_least(0, "adapter_memory_mib", "host_adapter_memory_mib", "row_folder_mib")
        self.require_at_least(0, "max_wait_s")
        if self.batch_invariant and self.trade_bits_for_speed:
            raise ValueError(
                "`batch_invariant` and `trade_bits_for_speed` exclude each other; give one"
            )
        self.require_at_least(1, "max_adapters", "max_running_samples", "replicas")
        self._check_devices()
        self.require_at_least(1, "queue_samples", "queue_tokens")
        for name, least in (
            ("max_batch_tokens", self.max_running_samples + CHUNK_TOKENS),
            ("kv_cache_tokens", CHUNK_TOKENS),
        ):
            value = getattr(self, name)
            if value != 0 and value < least:
                raise ValueError(
                    f"`{name}` must be at least {least}, or 0 to have it computed, got {value}"
                )

    @property
    def row_folders(self) -> list[Path]:
        """Where front and engine name files to each other."""
        memory = snapshot_folder(self.snapshot_memory_folder, self.store)
        return [folder.absolute() for folder in (self.copy_folder, memory) if folder is not None]

    @property
    def copy_folder(self) -> Path:
        return self.row_folder or self.store_folder / ".rows"

    def trainer_access(self) -> TrainerAccess | None:
        """How the trainer is reached that has the checkpoints; None: the store is no trainer."""
        if not is_wire_address(self.store):
            return None
        return TrainerAccess(
            address=self.store,
            key=self.store_api_key,
            ca=self.store_tls_ca,
            cert=self.store_tls_cert,
            cert_key=self.store_tls_key,
            allow_insecure=self.allow_insecure,
        )

    def _check_devices(self) -> None:
        devices = self.replica_devices
        if not self.devices:
            return
        for device in devices:
            if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
                raise ValueError(f"`devices` names {device!r}; give cpu, cuda or cuda:N for each")
        if self.device not in ("auto", *devices):
            raise ValueError(
                f"`device` {self.device} is none of `devices` {self.devices}; leave one of them out"
            )
        if len(devices) != self.replicas:
            raise ValueError(
                f"`devices` names {len(devices)} and `replicas` is {self.replicas}; name one "
                "device for each replica"
            )
        if len({device == "cpu" for device in devices}) > 1:
            raise ValueError(
                f"`devices` {self.devices} are of two kinds, on which a seed draws other tokens; "
                "start a sampler for each kind"
            )

    @property
    def replica_devices(self) -> tuple[str, ...]:
        return tuple(self.devices.split(",")) if self.devices else (self.device,) * self.replicas

    @property
    def sharers(self) -> int:
        """How many replicas divide the memory of `device`; Ray gives each engine its own."""
        if self.engines_on == "ray":
            return 1
        return max(1, self.replica_devices.count(self.device))

    @property
    def own_share(self) -> float:
        return self.memory_share / self.sharers

    def of_replica(self, number: int) -> Self:
        """What the engine of one replica is told."""
        return replace(self, device=self.replica_devices[number])

    def beside(self, devices: Sequence[str], device: str) -> Self:
        """What the engine of a replica is told that comes to others, which are on these devices.
        Raises ValueError over one that does not go with them.
        """
        all_ = (*devices, device)
        unlike = len(set(all_)) > 1
        if unlike and "auto" in all_:
            raise ValueError("`device` auto chose theirs; leave it out, or start with `devices`")
        named = ",".join(all_) if unlike else ""
        return replace(self, device=device, devices=named, replicas=len(all_))

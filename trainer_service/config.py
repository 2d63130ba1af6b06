"""What the trainer, front and engine, can be told at start."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from checkpoint_store import is_wire_address, snapshot_folder
from mint_core.addresses import host_and_port
from mint_core.hosting.service_config import ADDRESS, METRICS_ADDRESS, ServiceConfig, option

MAX_GROUPS = 256
SAVED_ROWS = "snapshots"  # folder of the rows in the state folder
STORE_SHARE = 0.8  # of the disk, for one tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig(ServiceConfig):
    """Trains LoRA adapters on one frozen base model, over gRPC."""

    address: str = option("127.0.0.1:50051", ADDRESS)
    metrics_address: str = option("127.0.0.1:9051", METRICS_ADDRESS)
    sampler_address: str = option(
        "",
        "HOST:PORT of the sampler that shares the store, for clients; empty: the same host, port "
        "50052",
    )
    groups: int = option(
        0,
        "engines among which training runs are spread, each with the whole base model; a run goes "
        "to another when loads differ, when its own is drained, and when that cannot start again; "
        "0: one for each of `devices`, or 1",
    )
    devices: str = option(
        "",
        "the device of each group, as in cuda:0,cuda:1; empty: `device` for all of them",
    )
    max_batch_tokens: int = option(
        0, "most tokens of one pass through the base model; 0: computed from free memory"
    )
    row_memory_mib: int = option(
        0,
        "memory of a group's device, in MiB, for the weights, gradients and moments of its runs; "
        "those of the runs idle for longest move to host memory, then to disk, and come back when "
        "they are called; 0: computed from free memory",
    )
    host_row_memory_mib: int = option(
        0,
        "the same of the host, beside a GPU (a CPU's runs move straight to disk); 0: computed from "
        "free memory",
    )
    row_folder: Path | None = option(
        None,
        "folder, on a local disk, for the runs that fit in no memory; what is in it is of no use "
        "to a later process and is removed by it; empty: `.rows` in the store, or in "
        "`local_folder`",
    )
    snapshot_memory_mib: int = option(
        0,
        "most memory, in MiB, that `snapshot_memory_folder` takes; the oldest snapshots go first, "
        "and are then read from the store; 0: computed from free memory",
    )
    retention_days: float = option(
        7.0,
        "how long a training run is kept that nobody calls, unless it was created with another "
        "time; its named checkpoints stay",
    )
    state: Path | None = option(
        None,
        "folder, on a local disk, of this trainer alone: the journal of its runs and their rows, "
        "from which it goes on after any crash; empty: `.state` in the store, or in "
        "`local_folder`",
    )
    state_quota_gib: float = option(
        0.0, "most GiB that the state may take before nothing new is accepted; 0: no limit"
    )
    store_quota_gib: float = option(
        0.0,
        "most GiB that one tenant's checkpoints, snapshots, uploads and merged models may take in "
        "the store; 0: with `keys`, four fifths of its disk, otherwise no limit",
    )
    snapshot_s: float = option(
        60.0,
        "seconds of computing, or of idleness, after which the row of a run is written to the "
        "state: about as much is computed again after a crash",
    )
    drain_s: float = option(
        15.0,
        "seconds from SIGTERM to the end, for calls under way and for rows to be written; what is "
        "left is done after the next start",
    )
    gap_s: float = option(
        60.0, "how long a call that came before an earlier one is held, in seconds"
    )
    queue_calls: int = option(
        1024,
        "most calls of one tenant (without `keys`: of one run) that wait for their answers; more "
        "are told to come again, which clients do by themselves",
    )
    queue_tokens: int = option(
        2_000_000,
        "the same in tokens: a call is taken while fewer than these wait, of whatever size it is",
    )

    def __post_init__(self) -> None:
        ServiceConfig.__post_init__(self)
        if is_wire_address(self.store):
            raise ValueError(
                f"`store` {self.store} is a trainer's address, which is for samplers; a trainer "
                "keeps its checkpoints in a folder or an object store"
            )
        if self.sampler_address:
            host_and_port(self.sampler_address, "sampler_address")
        self._check_groups()
        self.require_at_least(0, "max_batch_tokens", "row_memory_mib", "host_row_memory_mib")
        self.require_at_least(0, "snapshot_memory_mib", "state_quota_gib", "store_quota_gib")
        for name in ("gap_s", "retention_days", "snapshot_s", "drain_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be positive and finite, got {value}")
        self.require_at_least(1, "queue_calls", "queue_tokens")

    def _check_groups(self) -> None:
        self.require_at_least(0, "groups")
        if self.groups > MAX_GROUPS:
            raise ValueError(f"`groups` must be at most {MAX_GROUPS}, got {self.groups}")
        if not self.devices:
            return
        if self.device != "auto":
            raise ValueError(
                f"`device` {self.device} is that of all groups and `devices` {self.devices} says "
                "which each has; give one of the two"
            )
        if not all(self.group_devices):
            raise ValueError(f"`devices` {self.devices} has an empty place; give as many as groups")
        if self.groups not in (0, len(self.group_devices)):
            raise ValueError(
                f"`groups` is {self.groups} but `devices` names {len(self.group_devices)}; give a "
                "device for each group, or leave `groups` out"
            )

    @property
    def group_devices(self) -> tuple[str, ...]:
        """The device of each group."""
        if self.devices:
            return tuple(device.strip() for device in self.devices.split(","))
        return (self.device,) * (self.groups or 1)

    @property
    def sharing(self) -> int:
        """How many groups have this one's device, and divide its free memory."""
        if self.engines_on == "ray":
            return 1  # which gives each what it asks for
        return max(1, self.group_devices.count(self.device))

    @property
    def own_share(self) -> float:
        return self.memory_share / self.sharing

    @property
    def divided(self) -> int:
        """By how many what is free on the device is divided: a share of its own is already."""
        return 1 if self.memory_share else self.sharing

    @property
    def state_folder(self) -> Path:
        return self.state or self.store_folder / ".state"

    @property
    def saved_row_folder(self) -> Path:
        return self.state_folder.absolute() / SAVED_ROWS

    @property
    def idle_row_folder(self) -> Path:
        return self.row_folder or self.store_folder / ".rows"

    @property
    def row_folders(self) -> list[Path]:
        """Where front and engine name files to each other."""
        memory = snapshot_folder(self.snapshot_memory_folder, self.store)
        folders = (self.store_folder, self.state_folder, memory)
        return [folder.absolute() for folder in folders if folder is not None]

    @property
    def store_quota_bytes(self) -> int:
        """Of one tenant; 0: no limit."""
        if self.store_quota_gib or self.keys is None or self.store_is_remote:
            return int(self.store_quota_gib * 2**30)
        self.store_folder.mkdir(parents=True, exist_ok=True)
        return int(STORE_SHARE * shutil.disk_usage(self.store_folder).total)

    @property
    def row_memory_bytes(self) -> int:
        return self.row_memory_mib * 2**20

    @property
    def host_row_memory_bytes(self) -> int:
        return self.host_row_memory_mib * 2**20

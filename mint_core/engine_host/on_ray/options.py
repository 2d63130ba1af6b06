"""What a driver is told."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    address: str  # of the cluster that this machine is of; "auto": whichever that is
    listen: str = ""  # HOST:PORT for agents; empty: this machine's in the cluster, any free port
    strategy: str = "pack"  # or "spread"
    cpus: float = 1.0  # of one engine
    gpus: float = 0.0
    folder: str = ""  # see `Order`
    count: int = 1  # of the engines at start
    front_folders: tuple[str, ...] = ()  # in which jobs name files
    log_level: str = "INFO"

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray keeps free for an engine."""
        return {of: n for of, n in (("CPU", self.cpus), ("GPU", self.gpus)) if n > 0}

"""Both services with keys, and what is seen of their processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

import mint
from tests.hostile.attacks import Hostile
from tests.hostile.neighbour import Neighbour
from tests.keys import make_key
from tests.servers import RunningService, running_sampler, running_trainer


@dataclass(frozen=True, slots=True)
class Stage:
    services: tuple[RunningService, RunningService]
    hostile: Hostile
    neighbour: Neighbour
    honest: Neighbour  # another tenant, who only works much

    def fronts(self) -> list[psutil.Process]:
        return [psutil.Process(service.process.pid) for service in self.services]

    def engines(self) -> list[int]:
        """Their process ids: another is another engine."""
        children = [child for front in self.fronts() for child in front.children()]
        # Not the process that makes tokens of texts, which is started when it is first asked.
        return [each.pid for each in children if "mint_core.text" not in each.cmdline()]

    def descriptors(self) -> list[int]:
        return [front.num_fds() for front in self.fronts()]

    def resident_mib(self) -> list[int]:
        return [front.memory_info().rss >> 20 for front in self.fronts()]

    def logs(self) -> list[str]:
        return [service.log_text() for service in self.services]


@contextmanager
def staged(model: Path, folder: Path, size: int) -> Iterator[Stage]:
    keys = {tenant: make_key(tenant, folder / "keys") for tenant in ("bad", "good", "other")}
    flags = {"keys": folder / "keys", "base_model_name": "tiny"}
    limits = [("grpc.max_send_message_length", -1)]
    with (
        running_sampler(model, folder / "store", **flags) as sampler,
        running_trainer(
            model, folder / "store", **flags, sampler_address=sampler.address
        ) as trainer,
        grpc.insecure_channel(trainer.address, limits) as to_trainer,
        grpc.insecure_channel(sampler.address, limits) as to_sampler,
        mint.ServiceClient(base_url=trainer.address, api_key=keys["good"]) as good,
        mint.ServiceClient(base_url=trainer.address, api_key=keys["other"]) as other,
    ):
        hostile = Hostile(to_trainer, to_sampler, keys["bad"], size)
        workers = (Neighbour(each, each.create_sampling_client()) for each in (good, other))
        yield Stage((trainer, sampler), hostile, *workers)

"""One engine, the queue of what it is to compute, and what it has computed."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from mint_core.engine_host.pipe import Hello
from mint_core.engine_host.process import EngineProcess
from trainer_service.groups.meter import Meter
from trainer_service.jobs import EngineCounts, RowCounts
from trainer_service.queue.scheduler import Scheduler
from trainer_service.run_description import RunOrigin


@dataclass(slots=True, eq=False, kw_only=True)
class Group:
    """Runs live in groups. A row is in the engine of its run's group, or in none."""

    name: str
    device: str  # as it was asked for
    engine: EngineProcess
    scheduler: Scheduler
    meter: Meter
    hello: Hello | None = None  # of the engine in use, kept until another is up
    draining: bool = False  # its runs go elsewhere, and then it is gone
    failed: bool = False  # its engine has ended, and could not start again yet
    feeding: "asyncio.Task[None] | None" = None  # of its engine

    @property
    def kind(self) -> str:
        """Of its hardware and software: where it is the same, so is what is computed."""
        return self.hello.traits if self.hello else ""

    @property
    def takes_runs(self) -> bool:
        return self.engine.ready and not self.draining

    @property
    def counts(self) -> EngineCounts:
        """What the engine in use has told."""
        counts: EngineCounts | None = self.engine.report
        return counts or EngineCounts(rows=RowCounts(device=0, host=0, disk=0), passes={})


class Resident(Protocol):
    """A run, as far as its group is concerned."""

    origin: RunOrigin
    group: Group
    placed: bool
    row_life: int

    @property
    def id(self) -> str: ...

    @property
    def lost(self) -> bool: ...

    async def move_to(self, group: Group) -> bool: ...

    def stir_watchers(self) -> None: ...


class Residents(Protocol):
    """All runs."""

    def get(self, training_run_id: str) -> Resident | None: ...

    def all(self) -> Collection[Resident]: ...

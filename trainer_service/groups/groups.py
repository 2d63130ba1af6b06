"""The groups of a trainer: where runs are, where they go, and which engine does what needs no row.

One group or many, it is the same code. Where a run was is in no journal: after a restart of the
front its first call says where it is from then on.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from mint_core.engine_host.engines import Engines
from mint_core.engine_host.pipe import Hello, ModelDescription
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import (
    EngineDied,
    FailedPrecondition,
    MintError,
    ModelLoading,
    Unavailable,
)
from mint_core.hosting.tasks import Tasks
from trainer_service.config import TrainerConfig
from trainer_service.groups.balancing import Balancing, Move
from trainer_service.groups.group import Group, Resident, Residents
from trainer_service.groups.meter import Meter
from trainer_service.groups.placement import Placement
from trainer_service.groups.shares import Shares
from trainer_service.queue.scheduler import Scheduler
from trainer_service.queue.usage import Usage
from trainer_service.run_description import RunOrigin

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at loads
MOST_DEATHS = 3  # of engines during the same job that needs no row


class Groups:
    """All methods belong to one event loop."""

    def __init__(
        self,
        config: TrainerConfig,
        make_engine: Callable[[TrainerConfig, int], EngineProcess],
        usage: Usage,
        weight_of: Callable[[str], float],
        residents: Residents,
        tasks: Tasks,
    ) -> None:
        """`make_engine` by its number, from 0; `weight_of` a tenant: see `Planner`."""
        self._config = config
        self._make_engine = make_engine
        self._engines_made = itertools.count()
        self._usage = usage
        self._residents = residents
        self._tasks = tasks
        self._shares = Shares(weight_of)
        self._placement = Placement(Random(0))
        self._balancing = Balancing(self._placement)
        self._groups: dict[str, Group] = {}
        self._numbers = 0
        self.followers: set[Callable[[], None]] = set()  # called when forecasts change
        self.description: ModelDescription | None = None  # None: no engine has been up yet
        self.max_batch_tokens = 1  # of any group
        self._looking: asyncio.Task[None] | None = None
        self.closed = False
        devices = config.group_devices
        self.engines = Engines(self.make(devices[0]).engine)
        for device in devices[1:]:
            self.engines.add(self.make(device).engine)

    def __iter__(self) -> Iterator[Group]:
        return iter(list(self._groups.values()))

    def __len__(self) -> int:
        return len(self._groups)

    def get(self, name: str) -> Group | None:
        return self._groups.get(name)

    @property
    def first(self) -> Group:
        return next(iter(self._groups.values()))

    @property
    def model(self) -> ModelDescription:
        """The base model, as all groups can serve it. Raises ModelLoading while there is no
        description of it.
        """
        if self.description is None:
            raise ModelLoading
        return self.description

    @property
    def alike(self) -> bool:
        """Whether one group's rows go on in any other without a bit's difference, as far as it is
        known.
        """
        return len({group.kind for group in self._groups.values() if group.hello}) < 2

    # Which there are

    def make(self, device: str, name: str = "") -> Group:
        """A group, whose engine is not started yet."""
        if not name:
            name = f"group-{self._numbers}"
            self._numbers += 1
        there = 1 + sum(group.device == device for group in self)
        sharing = max(there, self._config.group_devices.count(device))
        config = replace(self._config, device=device, devices="", groups=sharing)
        engine = self._make_engine(config, next(self._engines_made))
        meter = Meter(name, self._usage, self._shares)
        weight_of = partial(self._shares.weight_of, name)
        scheduler = Scheduler(engine, meter, weight_of, self.followers)
        group = Group(name=name, device=device, engine=engine, scheduler=scheduler, meter=meter)
        self._groups[name] = group
        return group

    async def start(self) -> ModelDescription:
        """Starts all engines. Raises what keeps one of them from that."""
        for group in self:  # one after the other: each counts the memory that the others left
            await self.start_one(group)
        return self.model

    async def start_one(self, group: Group) -> None:
        try:
            self._welcome(group, await group.engine.start())
        except MintError as error:
            if len(self) > 1:
                said = error.message.replace("`device`", "`devices`")
                error.message = f"group `{group.name}` on {group.device}: {said}"
            raise

    def feed(self) -> None:
        """Has all compute what they are given."""
        for group in self:
            if group.feeding is None:
                work = group.scheduler.run()
                group.feeding = self._tasks.start(work, f"scheduler of {group.name}")
        if self._looking is None:
            self._looking = self._tasks.start(self._look(), "loads of groups")

    def close_to_runs(self, group: Group) -> None:
        """Has a group take no more runs."""
        group.draining = True
        self._placement.close(group.name)

    async def end(self, group: Group) -> None:
        """Ends a group that has no runs any more."""
        del self._groups[group.name]
        self._placement.remove(group.name)
        self._shares.forget(group.name)
        self.engines.remove(group.engine)
        if group.feeding:
            group.feeding.cancel()
        group.engine.life += 1  # no row is there
        await group.engine.close()
        self._describe()

    def load(self, group: Group) -> float:
        """How many of its runs have had work of late, on average."""
        return self._placement.load(group.name, time.monotonic())

    async def close(self) -> None:
        self.closed = True
        await asyncio.gather(*(group.engine.close() for group in self))

    def hold(self) -> None:
        """Gives the engines nothing more to compute, but for what they have."""
        for group in self:
            group.scheduler.hold()

    # Where runs are

    def assign(self, run: Resident, group: Group) -> None:
        """Has a run be in a group. What row it has elsewhere is none any more."""
        if run.placed and run.group is group:
            return
        run.group, run.placed, run.row_life = group, True, 0
        self._note(run)
        run.stir_watchers()

    def _note(self, run: Resident) -> None:
        if run.group.name in self._placement.groups:
            row_bytes = run.origin.whole_row_bytes
            self._placement.place(run.id, run.group.name, row_bytes, time.monotonic())

    def forget(self, training_run_id: str) -> None:
        """Notes that a run is gone."""
        self._placement.forget(training_run_id, time.monotonic())

    def choose(self, kind: str = "") -> Group:
        """For a run, if possible of that kind of hardware."""
        name = self._placement.choose(time.monotonic(), kind)
        if name is not None:
            return self._groups[name]
        left = [group for group in self if not group.draining]
        return next((group for group in left if not group.failed), left[0])

    def expect(self, training_run_id: str) -> Group:
        """The group for a run that is being made, which counts there from now on."""
        group = self.choose()
        if group.name in self._placement.groups:
            self._placement.place(training_run_id, group.name, 0, time.monotonic())
        return group

    async def home(self, run: Resident) -> int:
        """Sees to it that a run without a row is in a group whose engine is up, and returns that
        engine's life. A group whose engine only has to be started again keeps its runs; one that
        cannot be gives them to others. Raises Unavailable when the service ends.
        """
        while True:
            if not run.placed or run.group.draining or run.group.failed:
                self.assign(run, self.choose(run.group.kind if run.placed else ""))
            try:
                return await self.up(run.group)
            except Unavailable:
                if self.closed:
                    raise

    async def up(self, group: Group) -> int:
        """Waits until a group's engine is up and returns its life. Raises Unavailable if it could
        not start this time.
        """
        try:
            life = await group.scheduler.up()
        except Unavailable:
            if not group.failed:
                logger.error("group=%s cannot start again; its runs go elsewhere", group.name)
            group.failed = True
            self._placement.close(group.name)
            raise
        assert group.scheduler.hello is not None
        self._welcome(group, group.scheduler.hello)
        return life

    async def store(self, job: object) -> Any:
        """Does a job that needs no row, in whichever engine is least busy. Raises EngineDied when
        several have ended over it. While nothing more is computed no engine is waited for:
        Unavailable.
        """
        deaths = 0
        while True:
            group = self._idlest()
            if group.scheduler.held and not group.engine.ready:
                raise Unavailable("the server ends, and its engine has ended before it")
            try:
                return await group.scheduler.rowless(job)
            except EngineDied:
                deaths += 1
                if deaths == MOST_DEATHS:
                    raise
            except Unavailable:  # a group that is gone, or cannot start again this time
                if self.closed or len(self) == 1:
                    raise

    def _idlest(self) -> Group:
        def order(group: Group) -> tuple[bool, bool, bool, float]:
            busy = group.scheduler.busy
            return not group.engine.ready, group.draining, busy, group.meter.busy_share

        return min(self, key=order)

    def predict_s(self, origin: RunOrigin, alone: bool, tokens: int) -> float:
        """About when the run, or all of its tenant together, will have had so many more tokens
        computed.
        """
        run = self._residents.get(origin.training_run_id)
        own = run.group if run else self.first
        if alone or len(self) == 1:
            only = origin.training_run_id if alone else None
            return own.scheduler.predict_s(origin.tenant, only, tokens)
        # Groups work at the same time, each at a pace of its own.
        asked = [group.scheduler for group in self if group.scheduler.has_waiting(origin.tenant)]
        all_s = [each.predict_s(origin.tenant, None, tokens) for each in asked or [own.scheduler]]
        return 1 / sum(1 / seconds for seconds in all_s) if all(all_s) else 0.0

    # Loads

    async def _look(self) -> None:
        """Follows loads, and has runs moved where they differ, until cancelled."""
        then_s = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = time.monotonic()
            interval_s, then_s = now_s - then_s, now_s
            self._shares.look(interval_s)
            for group in self:
                group.meter.look(interval_s)
                await self._see(group)
                if group.name in self._placement.groups:
                    at_work = group.scheduler.at_work
                    self._placement.observe(group.name, at_work, interval_s, now_s)
            for move in self._balancing.moves(now_s):
                self._tasks.start(self._balance(move), f"move of {move.run}")

    async def _see(self, group: Group) -> None:
        """Has runs come to a group while its engine is up."""
        if not group.engine.ready:
            self._placement.close(group.name)
        elif group.hello and not group.draining and not self._placement.is_open(group.name):
            await self.up(group)

    async def _balance(self, move: Move) -> None:
        run, target = self._residents.get(move.run), self._groups.get(move.target)
        try:
            if run and target and not target.draining and run.group.name == move.source:
                await self.move(run, target)
        finally:
            self._balancing.ended(move)

    async def move(self, run: Resident, target: Group) -> bool:
        """Moves a run when it is next at rest. Returns whether it is there now."""
        if run.placed and not run.lost:
            return await run.move_to(target)
        self.assign(run, target)
        return True

    def run_counts(self) -> Counter[str]:
        """By group."""
        return Counter(run.group.name for run in self._residents.all() if run.placed)

    def runs_of(self, group: Group) -> Sequence[Resident]:
        return [run for run in self._residents.all() if run.group is group and run.placed]

    # What engines say of themselves

    def _welcome(self, group: Group, hello: Hello) -> None:
        group.scheduler.welcome(hello)
        group.failed = False
        if hello is not group.hello:
            self._check_alike(group, hello.model)
            group.hello = hello
            self._describe()
        if not group.draining and not self._placement.is_open(group.name):
            memory_bytes = hello.memory_limits.get("rows", 0)
            self._placement.open(group.name, group.kind, memory_bytes)

    def _check_alike(self, group: Group, model: ModelDescription) -> None:
        known = self.description
        if known and known.fingerprint != model.fingerprint:
            raise FailedPrecondition(
                f"group `{group.name}` has loaded a base model of fingerprint "
                f"{model.fingerprint}, and the others have {known.fingerprint}; put the files of "
                "`base_model` back, or restart the server"
            )

    def _describe(self) -> None:
        """What holds in all groups: a run may go to any."""
        hellos = [group.hello for group in self if group.hello]
        if not hellos:
            return
        least = min((hello.model for hello in hellos), key=lambda model: model.context_length)
        first = hellos[0].model
        self.description = replace(
            first,
            context_length=least.context_length,
            memory_bound=least.memory_bound,
            bitwise_reproducible=all(hello.model.bitwise_reproducible for hello in hellos),
        )
        self.max_batch_tokens = min(hello.max_batch_tokens for hello in hellos)

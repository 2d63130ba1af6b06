"""What an administrator sees of groups, and has done to them."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence

from mint_core.errors import AlreadyExists, FailedPrecondition, MintError, NotFound
from mint_core.hosting.tasks import Tasks
from mintrpc.v1 import admin_pb2, model_pb2
from trainer_service.config import MAX_GROUPS
from trainer_service.groups.group import Group, Resident
from trainer_service.groups.groups import Groups

logger = logging.getLogger(__name__)

MOVES = 8  # of a drain, at the same time
RETRY_S = 1.0  # until what could not move is tried again


class GroupDesk:
    """All methods belong to one event loop."""

    def __init__(self, groups: Groups, tasks: Tasks) -> None:
        self._groups = groups
        self._tasks = tasks

    def offered(self) -> model_pb2.GetServerCapabilitiesResponse:
        """What any caller is told."""
        groups = [_offered(group) for group in self._groups]
        return model_pb2.GetServerCapabilitiesResponse(groups=groups)

    def list(self) -> Sequence[admin_pb2.GroupStatus]:
        counts = self._groups.run_counts()
        return [self._status(group, counts) for group in self._groups]

    def drain(self, name: str) -> admin_pb2.GroupStatus:
        """Has a group's runs go elsewhere, and its engine end when all are gone."""
        group = self._groups.get(name)
        if group is None:
            raise NotFound(f"there is no group `{name}`; ListGroups names all", name=name)
        if not any(other is not group and other.takes_runs for other in self._groups):
            raise FailedPrecondition(
                f"no group but `{name}` takes runs; add one first (AddGroup), or stop the server "
                "(Drain)",
                name=name,
            )
        if not group.draining:
            logger.info("group=%s drains", name)
            self._groups.close_to_runs(group)
            self._tasks.start(self._empty(group), f"drain of {name}")
        return self._status(group, self._groups.run_counts())

    async def add(self, device: str, name: str) -> admin_pb2.GroupStatus:
        """Starts one more group."""
        if self._groups.get(name):
            raise AlreadyExists(f"there is a group `{name}`; choose another name", name=name)
        if len(self._groups) >= MAX_GROUPS:
            raise FailedPrecondition(f"there are {MAX_GROUPS} groups, the most of one server")
        # It starts whether or not its caller waits.
        group = await asyncio.shield(self._tasks.start(self._start(device, name), "a new group"))
        if isinstance(group, MintError):
            raise group
        return self._status(group, self._groups.run_counts())

    async def _start(self, device: str, name: str) -> Group | MintError:
        group = self._groups.make(device or self._groups.first.device, name)
        self._groups.engines.add(group.engine)
        try:
            await self._groups.start_one(group)
        except MintError as error:
            logger.error("group=%s cannot start: %s", group.name, error.message)
            await self._groups.end(group)
            return error
        self._groups.feed()
        logger.info("group=%s takes runs device=%s", group.name, group.device)
        return group

    async def _empty(self, group: Group) -> None:
        while runs := self._groups.runs_of(group):
            waiting = iter(runs)
            moved = await asyncio.gather(*(self._move(waiting) for _ in range(MOVES)))
            if not all(moved):
                await asyncio.sleep(RETRY_S)
        await self._groups.end(group)
        logger.info("group=%s is gone", group.name)

    async def _move(self, waiting: Iterator[Resident]) -> bool:
        """Moves runs, one after the other. Returns whether all have gone."""
        all_moved = True
        for run in waiting:
            target = self._groups.choose(run.group.kind)
            all_moved &= await self._groups.move(run, target)
        return all_moved

    def _status(self, group: Group, counts: Counter[str]) -> admin_pb2.GroupStatus:
        return admin_pb2.GroupStatus(
            name=group.name,
            device=group.device,
            state=_state(group),
            runs=counts[group.name],
            device_rows=group.counts.rows.device,
            host_rows=group.counts.rows.host,
            disk_rows=group.counts.rows.disk,
            tokens_per_second=group.meter.tokens_per_s,
            busy_share=group.meter.busy_share,
            load=self._groups.load(group),
            engine_restarts=group.engine.restarts,
        )


def _state(group: Group) -> admin_pb2.GroupStatus.State:
    if group.draining:
        return admin_pb2.GroupStatus.STATE_DRAINING
    if group.engine.ready:
        return admin_pb2.GroupStatus.STATE_UP
    return (
        admin_pb2.GroupStatus.STATE_FAILED if group.failed else admin_pb2.GroupStatus.STATE_STARTING
    )


def _offered(group: Group) -> model_pb2.Group:
    model = group.hello.model if group.hello else None
    return model_pb2.Group(
        name=group.name,
        device=model.device if model else "",
        dtype=model.dtype if model else "",
        ready=group.engine.ready,
    )

"""What an administrator sees of replicas, and has done to them."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence

from mint_core.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    MintError,
    ModelLoading,
    NotFound,
)
from mint_core.hosting.tasks import Tasks
from mintrpc.v1 import admin_pb2
from sampler_service.replicas.replica import Replica
from sampler_service.replicas.replicas import Replicas

logger = logging.getLogger(__name__)


class ReplicaDesk:
    """All methods belong to one event loop."""

    def __init__(
        self,
        replicas: Replicas,
        make: Callable[[str, str, Sequence[str]], Replica],
        tasks: Tasks,
    ) -> None:
        """`make`: one of that name on that device, with an engine that is not started yet, beside
        others on theirs. Raises ValueError over a device that does not go with those.
        """
        self._replicas = replicas
        self._make = make
        self._tasks = tasks
        self._numbers = itertools.count(len(replicas))
        self._starting: dict[str, Replica] = {}  # that take no requests yet

    def list(self) -> Sequence[admin_pb2.ReplicaStatus]:
        return [_status(each) for each in self._all()]

    def drain(self, name: str) -> admin_pb2.ReplicaStatus:
        """Gives a replica no more requests, and ends it when it has none."""
        replica = next((each for each in self._replicas if each.name == name), None)
        if replica is None:
            raise NotFound(f"there is no replica `{name}`; ListReplicas names all", name=name)
        if self._replicas.up in ([], [replica]):
            raise FailedPrecondition(
                f"no replica but `{name}` takes requests; add one first (AddReplica), or stop the "
                "server (Drain)",
                name=name,
            )
        if not replica.leaving:
            logger.info("replica=%s drains", name)
            replica.leaving = True
            self._tasks.start(self._empty(replica), f"drain of replica {name}")
        return _status(replica)

    async def add(self, device: str, name: str) -> admin_pb2.ReplicaStatus:
        """Starts one more replica."""
        if self._replicas.model is None:
            raise ModelLoading
        taken = [each.name for each in self._all()]
        if name in taken:
            raise AlreadyExists(f"there is a replica `{name}`; choose another name", name=name)
        name = name or next(each for each in map(str, self._numbers) if each not in taken)
        device = device or next(iter(self._replicas)).device
        others = [each.device for each in self._all() if not each.leaving]
        try:
            replica = self._starting[name] = self._make(name, device, others)
        except ValueError as error:
            raise InvalidRequest(
                f"`device` {device!r} does not go with the others: {error}", field="device"
            ) from error
        # It starts whether or not its caller waits.
        starting = self._tasks.start(self._start(replica), "a new replica")
        if failure := await asyncio.shield(starting):
            raise failure
        return _status(replica)

    def _all(self) -> Sequence[Replica]:
        return (*self._replicas, *self._starting.values())

    async def _start(self, replica: Replica) -> MintError | None:
        try:
            self._replicas.join(replica, await replica.engine.start(), self._tasks)
        except MintError as error:
            logger.error("replica=%s cannot start: %s", replica.name, error.message)
            await replica.engine.close()
            return error
        finally:
            del self._starting[replica.name]
        logger.info("replica=%s takes requests device=%s", replica.name, replica.device)
        return None

    async def _empty(self, replica: Replica) -> None:
        await self._replicas.drain(replica.name, None)
        self._replicas.remove(replica)
        logger.info("replica=%s is gone", replica.name)


def _status(replica: Replica) -> admin_pb2.ReplicaStatus:
    return admin_pb2.ReplicaStatus(
        name=replica.name,
        device=replica.device,
        state=_state(replica),
        requests=replica.requests,
        tokens=replica.under_way.total(),
        engine_restarts=replica.engine.restarts,
    )


def _state(replica: Replica) -> admin_pb2.ReplicaStatus.State:
    if replica.leaving:
        return admin_pb2.ReplicaStatus.STATE_DRAINING
    if replica.engine.ready:
        return admin_pb2.ReplicaStatus.STATE_UP
    return admin_pb2.ReplicaStatus.STATE_STARTING

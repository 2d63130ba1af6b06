"""AdminService, which both services answer: keys, tenants, and the server itself."""

import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from mint_core import __version__
from mint_core.access.key_file import USUAL, Key, add_key, remove_key
from mint_core.access.key_ring import KeyRing
from mint_core.access.tls import Tls
from mint_core.engine_host.view import EngineView
from mint_core.errors import FailedPrecondition, InvalidRequest
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import QuotaBook
from mintrpc.v1 import admin_pb2, admin_pb2_grpc

SERVICE = "mintrpc.v1.AdminService"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")

S = TypeVar("S", covariant=True)


class EngineDesk(Protocol[S]):
    """What an administrator asks of a service's engines and has done to them."""

    def list(self) -> Sequence[S]: ...

    def drain(self, name: str) -> S: ...

    async def add(self, device: str, name: str) -> S: ...


GroupDesk = EngineDesk[admin_pb2.GroupStatus]
ReplicaDesk = EngineDesk[admin_pb2.ReplicaStatus]


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Answers from the files and counters that the service goes by itself."""

    def __init__(
        self,
        keys: KeyRing | None,
        quotas: QuotaBook,
        metrics: Metrics,
        engine: EngineView,
        tls: Tls | None,
        stop: Callable[[], None],  # as SIGTERM does
        groups: GroupDesk | None = None,
        replicas: ReplicaDesk | None = None,
    ) -> None:
        self._keys = keys
        self._quotas = quotas
        self._metrics = metrics
        self._engine = engine
        self._tls = tls
        self._stop = stop
        self._groups = groups
        self._replicas = replicas
        self._draining = False
        self._start_s = time.time()

    async def ListKeys(
        self, request: admin_pb2.ListKeysRequest, context: Any
    ) -> admin_pb2.ListKeysResponse:
        """See admin.proto."""
        ring = self._ring()
        return admin_pb2.ListKeysResponse(keys=[_message(ring, key) for key in ring.all()])

    async def CreateKey(
        self, request: admin_pb2.CreateKeyRequest, context: Any
    ) -> admin_pb2.CreateKeyResponse:
        """See admin.proto."""
        ring = self._ring()
        try:
            secret, key = add_key(
                ring.file,
                request.tenant,
                scopes=frozenset(request.scopes) or USUAL,
                expires=_end_of(request),
                comment=request.comment,
                weight=request.weight or None,
            )
        except FailedPrecondition as error:
            raise InvalidRequest(error.message, **error.metadata) from error
        return admin_pb2.CreateKeyResponse(api_key=secret, key=_message(ring, key))

    async def RevokeKey(
        self, request: admin_pb2.RevokeKeyRequest, context: Any
    ) -> admin_pb2.RevokeKeyResponse:
        """See admin.proto."""
        ring = self._ring()
        if not request.key_id:
            raise InvalidRequest("`key_id` is empty; ListKeys names all", field="key_id")
        key = remove_key(ring.file, request.key_id)
        return admin_pb2.RevokeKeyResponse(key=_message(ring, key))

    async def ListTenants(
        self, request: admin_pb2.ListTenantsRequest, context: Any
    ) -> admin_pb2.ListTenantsResponse:
        """See admin.proto."""
        held: dict[str, dict[str, float]] = defaultdict(dict)
        for (quota, tenant), amount in self._quotas.used().items():
            held[tenant][quota] = amount
        usage = self._metrics.by_tenant()
        keyed = {key.tenant for key in self._keys.all()} if self._keys else set()
        return admin_pb2.ListTenantsResponse(
            tenants=[
                admin_pb2.Tenant(
                    tenant=tenant,
                    weight=self._keys.weight_of(tenant) if self._keys else 1.0,
                    quotas=dataclasses.asdict(self._quotas.of(tenant)),
                    held=held.get(tenant),
                    usage=usage.get(tenant),
                )
                for tenant in sorted(keyed | held.keys() | usage.keys())
            ]
        )

    async def GetServerState(
        self, request: admin_pb2.GetServerStateRequest, context: Any
    ) -> admin_pb2.GetServerStateResponse:
        """See admin.proto."""
        return admin_pb2.GetServerStateResponse(
            server_version=__version__,
            start_time=_time(self._start_s),
            engine_ready=self._engine.ready,
            engine_restarts=self._engine.restarts,
            draining=self._draining,
            calls=sum(
                int(amount)
                for (quota, _), amount in self._quotas.used().items()
                if quota == "calls"
            ),
            certificate_expire_time=_time(self._tls.expires_s()) if self._tls else None,
        )

    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainResponse:
        """See admin.proto."""
        self._draining = True
        self._stop()
        return admin_pb2.DrainResponse()

    async def ListGroups(
        self, request: admin_pb2.ListGroupsRequest, context: Any
    ) -> admin_pb2.ListGroupsResponse:
        """See admin.proto."""
        return admin_pb2.ListGroupsResponse(groups=self._group_desk().list())

    async def DrainGroup(
        self, request: admin_pb2.DrainGroupRequest, context: Any
    ) -> admin_pb2.DrainGroupResponse:
        """See admin.proto."""
        name = _name_of(request, "ListGroups")
        return admin_pb2.DrainGroupResponse(group=self._group_desk().drain(name))

    async def AddGroup(
        self, request: admin_pb2.AddGroupRequest, context: Any
    ) -> admin_pb2.AddGroupResponse:
        """See admin.proto."""
        group = await self._group_desk().add(*_place_of(request))
        return admin_pb2.AddGroupResponse(group=group)

    async def ListReplicas(
        self, request: admin_pb2.ListReplicasRequest, context: Any
    ) -> admin_pb2.ListReplicasResponse:
        """See admin.proto."""
        return admin_pb2.ListReplicasResponse(replicas=self._replica_desk().list())

    async def DrainReplica(
        self, request: admin_pb2.DrainReplicaRequest, context: Any
    ) -> admin_pb2.DrainReplicaResponse:
        """See admin.proto."""
        name = _name_of(request, "ListReplicas")
        return admin_pb2.DrainReplicaResponse(replica=self._replica_desk().drain(name))

    async def AddReplica(
        self, request: admin_pb2.AddReplicaRequest, context: Any
    ) -> admin_pb2.AddReplicaResponse:
        """See admin.proto."""
        replica = await self._replica_desk().add(*_place_of(request))
        return admin_pb2.AddReplicaResponse(replica=replica)

    def _group_desk(self) -> GroupDesk:
        if self._groups is None:
            raise FailedPrecondition("this server has no groups of runs; ask the trainer's port")
        return self._groups

    def _replica_desk(self) -> ReplicaDesk:
        if self._replicas is None:
            raise FailedPrecondition("this server has no replicas; ask the sampler's port")
        return self._replicas

    def _ring(self) -> KeyRing:
        if self._keys is None:
            raise FailedPrecondition("this server has no keys; start it with --keys FILE")
        return self._keys


def _name_of(
    request: admin_pb2.DrainGroupRequest | admin_pb2.DrainReplicaRequest, listing: str
) -> str:
    if not request.name:
        raise InvalidRequest(f"`name` is empty; {listing} names all", field="name")
    return request.name


def _place_of(
    request: admin_pb2.AddGroupRequest | admin_pb2.AddReplicaRequest,
) -> tuple[str, str]:
    """Device and name, which may be empty."""
    device, name = request.device, request.name
    if device and not _DEVICE.fullmatch(device):
        raise InvalidRequest(
            f"`device` {device!r} is none; give cpu, cuda or cuda:N", field="device"
        )
    if name and not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"`name` {name!r} is none; give 1 to 64 letters, digits, `.`, `_` or `-`, the first a "
            "letter or digit",
            field="name",
        )
    return device, name


def _message(ring: KeyRing, key: Key) -> admin_pb2.Key:
    used_s = ring.last_use_s.get(key.id)
    return admin_pb2.Key(
        key_id=key.id,
        tenant=key.tenant,
        scopes=sorted(key.scopes),
        expire_time=_stamp(key.expires) if key.expires else None,
        comment=key.comment,
        last_use_time=_time(used_s) if used_s else None,
    )


def _end_of(request: admin_pb2.CreateKeyRequest) -> datetime | None:
    if not request.HasField("expire_time"):
        return None
    try:
        return request.expire_time.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest(
            "`expire_time` is no time of the years 1 to 9999", field="expire_time"
        ) from None


def _time(seconds: float) -> Timestamp:
    return _stamp(datetime.fromtimestamp(seconds, UTC))


def _stamp(when: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(when)
    return stamp

"""A gRPC server with what all services share: access, errors, metrics, log, health, reflection."""

import asyncio
import logging
import resource
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Literal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from mint_core.access.audit import AuditLog
from mint_core.access.door import Door
from mint_core.access.tls import Tls
from mint_core.errors import FailedPrecondition
from mint_core.rpc.interceptors import CallInterceptor
from mint_core.rpc.limits import MAX_MESSAGE_BYTES
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import QuotaBook

logger = logging.getLogger(__name__)

Role = Literal["trainer", "sampler"]

# Calls wait for minutes without a byte. Clients may ask every second whether the server lives,
# which gRPC would answer with a GOAWAY after three times, and the server asks after its clients.
_SIGNS_OF_LIFE = (
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)
# A burst of calls waits in gRPC until the event loop takes them in. By default gRPC cancels some of
# more than 1,000, all of more than 3,000, and those that have waited for 30 s, without a word. How
# much is accepted is for the services to say.
_BURSTS = (
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 200_000),
    ("grpc.server_max_unrequested_time_in_server", 600),  # seconds
)
MAX_DESCRIPTORS = 65_536
# Until a connection has shown that it speaks TLS and HTTP/2; whoever says nothing holds a place.
HANDSHAKE_S = 30.0
LOOK_S = 0.1  # between two looks at whether gRPC serves


class RpcServer:
    """Serves what is added to it. All methods belong to one event loop."""

    def __init__(
        self,
        address: str,  # HOST:PORT; port 0: one that is free
        *,
        door: Door,
        tls: Tls | None = None,  # None: in plaintext
        metrics: Metrics,
        quotas: QuotaBook | None = None,  # None: the defaults
        audit: AuditLog | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_connections: int | None = None,  # None: half the descriptors
    ) -> None:
        self._address = address
        self._tls = tls
        calls = CallInterceptor(door, metrics, quotas or QuotaBook(None, metrics), audit)
        self.keep_checking = calls.keep_checking  # to be run beside the calls
        self.begin = calls.begun.set  # what is held until the model is loaded goes on
        self._calls = calls
        self._options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_allowed_incoming_connections", max_connections or _descriptors() // 2),
            ("grpc.so_reuseport", 0),  # a port in use is refused instead of shared
            ("grpc.server_handshake_timeout_ms", round(1e3 * HANDSHAKE_S)),
            *_SIGNS_OF_LIFE,
            *_BURSTS,
        ]
        self._server: grpc.aio.Server
        self._keeping: asyncio.Task[None] | None = None
        self._health = health.aio.HealthServicer()
        self._services: dict[str, Callable[[grpc.aio.Server], None]] = {}
        self._drains: list[Callable[[], Awaitable[None]]] = []
        self._closes: list[Callable[[], Awaitable[None]]] = []

    def add(
        self, adder: Callable[[Any, grpc.aio.Server], None], servicer: object, name: str
    ) -> None:
        """Adds a servicer by its generated function and the service's full name."""
        self._services[name] = partial(adder, servicer)

    def drain_by(self, drain: Callable[[], Awaitable[None]]) -> None:
        """Has work under way brought to an end first, while calls are still answered; streams
        without an end of their own would use up the grace.
        """
        self._drains.append(drain)

    def close_by(self, close: Callable[[], Awaitable[None]]) -> None:
        """Has what calls go by closed when the last of them has ended."""
        self._closes.append(close)

    async def start(self) -> int:
        """Listens, NOT_SERVING, and returns the port. Refuses an address that cannot be bound."""
        await self.set_serving(False)
        port = await self._listen(self._address)
        if port == 0:
            raise FailedPrecondition(
                f"`address` {self._address} cannot be listened on, most likely because its"
                " port is in use; choose another, as `make serve PORT=50061` does for all",
                address=self._address,
            )
        host = self._address.rpartition(":")[0]
        self._keeping = asyncio.create_task(self._keep_listening(f"{host}:{port}"))
        return port

    async def _listen(self, address: str) -> int:
        """Serves there, and returns the port; 0: it cannot be had."""
        server = grpc.aio.server(interceptors=[self._calls], options=self._options)
        # Methods that are registered are waited for one by one, at every call, and with memory that
        # is given back where gRPC ends over a path that is no text, while its core writes there.
        server.add_registered_method_handlers = lambda *_: None  # type: ignore[method-assign]
        for add in self._services.values():
            add(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        server.add_generic_rpc_handlers([_reflection_v1(names)])
        try:
            if self._tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._tls.credentials())
        except RuntimeError:
            return 0
        if port:
            await server.start()
            self._server = server
        return int(port)

    async def _keep_listening(self, address: str) -> None:
        """Serves again where gRPC has ended over a caller's path that is no text, as its asyncio
        server does. Callers who were there find their calls broken off, and send them again.
        """
        while True:
            await asyncio.sleep(LOOK_S)
            if self._server._server.is_running():  # type: ignore[attr-defined]  # nothing else tells
                continue
            logger.error("gRPC has ended over a path that is no text; serving again")
            await self._server.stop(None)  # it has begun to, and waits for calls
            while not await self._listen(address):
                await asyncio.sleep(LOOK_S)

    async def set_serving(self, serving: bool) -> None:
        """Sets what the standard health service says of the server and of each service."""
        Status = health_pb2.HealthCheckResponse
        status = Status.SERVING if serving else Status.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING, drains, refuses new calls, gives those under way `grace_s` to end, and
        cancels the rest.
        """
        await self._health.enter_graceful_shutdown()
        self.begin()  # or it is told that it may come again
        for drain in self._drains:
            await drain()
        if self._keeping is not None:
            self._keeping.cancel()
            await self._server.stop(grace_s)
        for close in self._closes:
            await close()


def _reflection_v1(names: Sequence[str]) -> grpc.GenericRpcHandler:
    """Reflection under the name that newer tools ask for first, with the same messages."""
    servicer = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    service = reflection.SERVICE_NAME.replace("v1alpha", "v1")
    return grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler})


def _descriptors() -> int:
    """How many this process may have, once that is as many as it may ask for. Connections get some
    of them, so that the journal, the store and new engines always find others.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft not in (most, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most

"""The life of a service process: listen, start the engine, serve until told to stop."""

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from mint_core.access.audit import AuditLog
from mint_core.access.door import Door
from mint_core.access.key_ring import KeyRing
from mint_core.access.tls import Tls
from mint_core.addresses import host_and_port
from mint_core.durable_files import make_folder
from mint_core.engine_host.view import EngineView
from mint_core.errors import FailedPrecondition, InvalidRequest, MintError
from mint_core.hosting.service_config import ServiceConfig
from mint_core.hosting.settings import Settings
from mint_core.hosting.tasks import Tasks
from mint_core.owned_folder import remove_abandoned_rows
from mint_core.rpc.admin_service import SERVICE as ADMIN_SERVICE
from mint_core.rpc.admin_service import AdminServicer
from mint_core.rpc.garbage import give_back_what_is_freed, spare_what_is_there
from mint_core.rpc.hosting import Role, RpcServer
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import QuotaBook
from mintrpc.v1 import admin_pb2_grpc

logger = logging.getLogger(__name__)

MIN_FREE_BYTES = 100 * 1024 * 1024  # in the store's folder, at start
GRACE_S = 5.0  # for calls under way when the service stops

C = TypeVar("C", bound=ServiceConfig)


class Service(Protocol):
    """What trainer and sampler each put between the network and their engines."""

    tasks: Tasks  # what it does in the background: it cannot go on without any of it

    @property
    def engine(self) -> EngineView: ...

    def add_to(self, server: RpcServer) -> None:
        """Adds the servicers. Called once, before `start`."""

    async def start(self) -> None:
        """Starts the engine and returns when it is ready. Raises a MintError if it cannot run."""

    async def stop(self) -> None:
        """Ends the engine."""


class TaskDied(Exception):
    """A service lacks something that it does in the background."""


Build = Callable[[C, Metrics, Door, QuotaBook], Service]


def run_service(role: Role, kind: type[C], build: Build[C]) -> int:
    """Serves until SIGINT or SIGTERM and returns the exit status: 1 if it could not run."""
    try:
        settings = Settings(role, kind, sys.argv[1:])
    except InvalidRequest as error:
        sys.exit(f"{role} cannot start: {error}")
    set_up_logging(settings.config.log_level)
    give_back_what_is_freed()
    try:
        asyncio.run(_live(settings.config, role, build))
    except MintError as error:
        logger.error("%s cannot start: %s", role, settings.as_given(error.message))
        return 1
    except TaskDied as error:
        logger.critical("%s cannot go on without a task that has died: %s", role, error)
        return 1
    return 0


def _told(record: logging.LogRecord) -> bool:
    """Whether a line of gRPC's is news: what is no text in a header is not, and may be a key."""
    of_headers = record.exc_info and record.exc_info[0] is UnicodeDecodeError
    return not (of_headers or "codec can't decode" in record.getMessage())


def set_up_logging(level: str) -> None:
    """Log lines go to standard error, with time, level and origin."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    for name in ("grpc._cython.cygrpc", "asyncio"):
        logging.getLogger(name).addFilter(_told)


async def _live(config: C, role: Role, build: Build[C]) -> None:
    stopped = stop_signal()
    check_folders(config)
    keys = KeyRing(config.keys) if config.keys else None
    tls = None
    if config.tls_cert and config.tls_key:
        tls = Tls(config.tls_cert, config.tls_key, config.client_ca)
    door = Door(keys, tls, config.tenant_by)
    audit = AuditLog(config.audit_log) if config.audit_log else None
    metrics = Metrics()
    quotas = QuotaBook(config.quotas, metrics)
    server = RpcServer(
        config.address, door=door, tls=tls, metrics=metrics, quotas=quotas, audit=audit
    )
    service = build(config, metrics, door, quotas)
    service.add_to(server)
    groups = getattr(service, "group_desk", None)  # of a trainer
    replicas = getattr(service, "replica_desk", None)  # of a sampler
    admin = AdminServicer(keys, quotas, metrics, service.engine, tls, stopped.set, groups, replicas)
    server.add(admin_pb2_grpc.add_AdminServiceServicer_to_server, admin, ADMIN_SERVICE)
    metrics.watch_engine(service.engine)
    try:
        address, metrics_address = await _listen(config, role, server, metrics, tls)
        logger.info(
            "%s starting address=%s base_model=%s store=%s",
            role,
            address,
            config.base_model,
            config.store if config.store_is_remote else config.store_folder.absolute(),
        )
        if await first(service.start(), stopped):
            server.begin()
            spare_what_is_there()
            _tell_memory(role, service.engine, metrics)
            if not door.tells_tenants:
                logger.info("no `keys`: loopback only, every caller is the tenant `default`")
            logger.info("%s listening on %s metrics=%s", role, address, metrics_address)
            if config.ready_file:
                addresses = {"address": address, "metrics_address": metrics_address}
                write_whole(config.ready_file, json.dumps(addresses))
            service.tasks.start(server.keep_checking(), "keys and certificates")
            await first(_serve(service, server), stopped)
    finally:
        await server.stop(GRACE_S)
        await service.stop()
    logger.info("%s stopped", role)


def _tell_memory(role: Role, engine: EngineView, metrics: Metrics) -> None:
    """Says what the service may take, for those who start it beside others."""
    for of in engine.memory_limits:
        metrics.memory_limit(of, partial(engine.memory_limit, of))
    limits = {of: size_bytes for of, size_bytes in metrics.memory_limits().items() if size_bytes}
    logger.info(
        "%s takes up to %.1f GiB of memory as it is needed: %s; %.1f of the host's %.1f are free",
        role,
        sum(limits.values()) / 2**30,
        ", ".join(f"{of} {size_bytes / 2**30:.2f}" for of, size_bytes in limits.items()),
        psutil.virtual_memory().available / 2**30,
        psutil.virtual_memory().total / 2**30,
    )


async def _listen(
    config: ServiceConfig, role: Role, server: RpcServer, metrics: Metrics, tls: Tls | None
) -> tuple[str, str]:
    """Takes the ports before the engine loads, so that a port in use is refused at once."""
    scheme = "https://" if tls else ""
    port = await server.start()
    metrics_address = config.metrics_address
    if metrics_address:
        sign = f"metrics are at /metrics; the {role} speaks gRPC, not HTTP/1, on port {port}"
        metrics_port = metrics.serve(metrics_address, tls.context if tls else None, sign)
        metrics_address = scheme + _with_port(metrics_address, metrics_port)
    return scheme + _with_port(config.address, port), metrics_address


def write_whole(file: Path, text: str) -> None:
    """Renames the file into place: who sees it sees all of it."""
    draft = file.with_name(f".{file.name}.draft")
    try:
        draft.write_text(text)
        draft.rename(file)
    except OSError as error:
        raise FailedPrecondition(
            f"`ready_file` {file} cannot be written: {error.strerror}; choose another"
        ) from error


def check_folders(config: ServiceConfig) -> None:
    """Refuses a base model whose folder is missing, and a store that cannot be written."""
    if _is_path(config.base_model) and not Path(config.base_model).is_dir():
        raise FailedPrecondition(
            f"`base_model` {config.base_model} is no folder; `make model` makes the embedded one,"
            " and a hub id looks like OWNER/NAME"
        )
    folder = config.store_folder
    what = f"`{'local_folder' if config.store_is_remote else 'store'}` {folder}"
    try:
        make_folder(folder.absolute())
    except OSError as error:
        raise FailedPrecondition(
            f"{what} cannot be made: {error.strerror}; choose another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise FailedPrecondition(f"{what} cannot be written; choose another folder")
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        remove_abandoned_rows(getattr(config, "row_folder", None) or folder / ".rows")
    if (free := shutil.disk_usage(folder).free) < MIN_FREE_BYTES:
        raise FailedPrecondition(
            f"{what} has {free // 2**20} MiB of free space and needs"
            f" {MIN_FREE_BYTES // 2**20}; free some, or choose another folder"
        )


def _is_path(base_model: str) -> bool:
    return base_model.startswith((".", "/", "~")) or base_model.count("/") > 1


def _with_port(address: str, port: int) -> str:
    host, _ = host_and_port(address, "address")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def stop_signal() -> asyncio.Event:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    return stopped


async def first(work: Coroutine[Any, Any, None], stopped: asyncio.Event) -> bool:
    """Whether the work ended before the signal to stop, which cancels it."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stopped.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    ended = working.done()
    for task in (working, stopping):
        task.cancel()
    await asyncio.wait({working, stopping})
    if ended:
        working.result()  # raises what the work raised
    return ended


async def _serve(service: Service, server: RpcServer) -> None:
    """Follows the engine's state. Raises if the service cannot go on."""
    service.tasks.start(_follow(service.engine, server), "health")
    error = await service.tasks.failure()
    raise TaskDied(str(error)) from error


async def _follow(engine: EngineView, server: RpcServer) -> None:
    """Keeps the health service at the engine's state."""
    while True:
        engine.changed.clear()
        await server.set_serving(engine.ready)
        await engine.changed.wait()

"""The actor beside an engine: starts it as its child, and stands for its front there."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mint_core.engine_host.carried import ROOT_VARIABLE, beneath
from mint_core.engine_host.child_process import await_end, how_it_ended
from mint_core.engine_host.host import End
from mint_core.engine_host.on_ray.certificates import FRONT, agent_context, request
from mint_core.engine_host.on_ray.files import Arrival, send_file
from mint_core.engine_host.on_ray.frames import PIECE_BYTES, Kind, Link, PeerGone
from mint_core.owned_folder import OwnedFolder, temporary_folder

FOLDER_PREFIX = "mint-engine-"
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")  # lengths in the pipe


class Place(NamedTuple):
    """What tells one disk's folder from another's, on machines that may be the same."""

    path: str
    device: int
    inode: int


class Order(NamedTuple):
    """What an agent is to do."""

    address: tuple[str, int]  # of its driver
    authority: bytes
    certificate: bytes
    module: str
    working_folder: str  # the front's
    folder: str  # for the front's files, always; empty: a temporary one, where they are not here
    machine: str  # the front's
    places: tuple[Place, ...]  # folders of the front
    environment: dict[str, str]  # beside the machine's own


class Started(NamedTuple):
    pid: int | None  # of the engine, if this is the front's machine
    shared: bool  # whether it has the front's disk
    free_bytes: int  # of its own otherwise


def this_machine() -> str:
    """Another at each start of a machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("mintrpc")
    return "of its sources"


class EngineAgent:
    """An actor of Ray. It lives for one engine."""

    def __init__(self) -> None:
        self._key = b""
        self._engine: subprocess.Popen[bytes]
        self._folder: OwnedFolder | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()  # pieces do not say of which file they are

    async def request(self, wanted: str) -> bytes:
        """The request for a certificate of a key that is made here. `wanted`: the front's
        version.
        """
        if wanted != version():
            raise ValueError(f"has mintrpc {version()}, and the front {wanted}; install the same")
        self._key, asked = request()
        return asked

    async def start(self, order: Order) -> Started:
        """Meets the driver, starts the engine, and serves both until one of them is gone."""
        host, port = order.address
        context = agent_context(order.authority, order.certificate, self._key)
        self._key = b""
        try:
            self._link = Link(
                *await asyncio.open_connection(
                    host, port, ssl=context, server_hostname=FRONT, limit=2 * PIECE_BYTES
                )
            )
        except OSError as error:
            raise ConnectionError(
                f"cannot reach the service at {host} port {port} ({error}); give an address "
                "that it can by `ray_listen`"
            ) from error
        environment, free = os.environ | order.environment, 0
        shared = not order.folder and has_disk(order)
        if not shared:
            self._folder, free = self._own_folder(order.folder)
            environment[ROOT_VARIABLE] = str(self._folder.path)
        folder = order.working_folder
        ours, theirs = socket.socketpair()
        with theirs:
            self._engine = subprocess.Popen(
                [sys.executable, "-m", order.module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=folder if Path(folder).is_dir() else None,
            )
        self._from_engine, self._to_engine = await asyncio.open_connection(
            sock=ours, limit=2 * PIECE_BYTES
        )
        self._serve(self._serve_driver())
        self._serve(self._serve_engine())
        near = order.machine == this_machine()
        return Started(self._engine.pid if near else None, shared, free)

    def _own_folder(self, folder: str) -> tuple[OwnedFolder, int]:
        """Raises OSError."""
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            owned = OwnedFolder(Path(folder), FOLDER_PREFIX)
        else:
            owned = temporary_folder(FOLDER_PREFIX)
        free = os.statvfs(owned.path)
        return owned, free.f_bavail * free.f_frsize

    def _serve(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_driver(self) -> None:
        """Does what the driver says; an engine without it is of no use, nor is this process."""
        try:
            while True:
                await self._do(*await self._link.take())
        except OSError as error:
            end = End(f"the engine's machine cannot keep its files: {error.strerror}", False)
            with contextlib.suppress(PeerGone):
                await self._link.tell(Kind.ENDED, end)
            self._quit()
        except PeerGone:
            self._quit()
        except BaseException:
            traceback.print_exc()
            self._quit()

    async def _do(self, kind: Kind, content: bytes) -> None:
        match kind:
            case Kind.PIECE:
                with contextlib.suppress(OSError):  # that it has ended is told elsewhere
                    self._to_engine.write(content)
                    await self._to_engine.drain()
            case Kind.FILE:
                path, mode = json.loads(content)
                file = self._there(path)
                file.parent.mkdir(parents=True, exist_ok=True)
                self._arrival = await asyncio.to_thread(Arrival, file, mode)
            case Kind.FILE_PIECE:
                await asyncio.to_thread(self._arrival.add, content)
            case Kind.FILE_END:
                await asyncio.to_thread(self._arrival.finish, content)
            case Kind.ROOM:
                for path in json.loads(content):
                    self._there(path).parent.mkdir(parents=True, exist_ok=True)
            case Kind.DROP:
                for path in json.loads(content):
                    await asyncio.to_thread(self._there(path).unlink, missing_ok=True)
            case Kind.GET:
                self._serve(self._send_files(*json.loads(content)))
            case Kind.KILL:
                self._engine.kill()
            case Kind.CLOSE:
                self._to_engine.close()
            case _:
                raise AssertionError(f"{kind!r} is not for an agent")

    async def _send_files(self, number: int, paths: list[str]) -> None:
        error = 0, ""
        async with self._sending:
            try:
                for path in paths:
                    await send_file(self._link, self._there(path), path)
            except OSError as failed:
                error = failed.errno or 5, failed.strerror or ""
            await self._link.tell(Kind.GOT, [number, *error])

    async def _serve_engine(self) -> None:
        """Hands on what the engine says, each message in one turn, and tells how it has ended."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                header = await self._from_engine.readexactly(_SHORT.size)
                (length,) = _SHORT.unpack(header)
                if length == -1:
                    header += await self._from_engine.readexactly(_LONG.size)
                    (length,) = _LONG.unpack(header[_SHORT.size :])
                await self._hand_on(header, length)
        self._to_engine.close()
        status = await asyncio.to_thread(await_end, self._engine)
        if self._folder is not None:
            await asyncio.to_thread(self._folder.remove)
        with contextlib.suppress(PeerGone):
            await self._link.tell(Kind.ENDED, how_it_ended(status))

    async def _hand_on(self, header: bytes, left: int) -> None:
        async with self._link.turn:
            piece = header
            while left:
                if piece:
                    await self._link.put(Kind.PIECE, piece)
                piece = await self._from_engine.readexactly(min(left, PIECE_BYTES))
                left -= len(piece)
            await self._link.put(Kind.LAST, piece)

    def _there(self, path: str) -> Path:
        assert self._folder is not None, "who has the front's disk is brought nothing"
        return beneath(self._folder.path, path)

    def _quit(self) -> None:
        self._engine.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder.path, ignore_errors=True)
        os._exit(0)


def has_disk(order: Order) -> bool:
    """Whether the front's folders are here under the same names."""
    return order.machine == this_machine() and order.places == places(
        [place.path for place in order.places]
    )


def places(folders: list[str]) -> tuple[Place, ...]:
    """Of those that are there."""
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):
            told = os.stat(folder)
            found.append(Place(folder, told.st_dev, told.st_ino))
    return tuple(found)

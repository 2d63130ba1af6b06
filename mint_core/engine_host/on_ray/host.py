"""The front's side of Ray: its driver, a process, and engines that it asks it for.

Each engine has two streams to the driver, over a socket in a folder of this user alone. The first
line of either says what it is: `{"launch": MODULE, "place": N}` is answered by `{"pid": ...}` once
the engine runs, and by `{"end": ...}` when nothing of it is left; to close it is to end the engine.
`{"pipe": NAME}` then becomes the pipe.
"""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from mint_core.engine_host.carried import NO_FILES, FilesOf, JobFiles
from mint_core.engine_host.host import EXIT_LIMIT_S, CannotLaunch, End
from mint_core.engine_host.on_ray.options import RayOptions
from mint_core.owned_folder import temporary_folder

DRIVER = "mint_core.engine_host.on_ray.driver"
LOST = End("the way to Ray was lost with its driver", killed=True)


class RayHosts:
    """A driver, and the places for engines that it is asked for."""

    def __init__(self, options: RayOptions, files: FilesOf) -> None:
        self._options = options
        self.files = files
        self._folder = temporary_folder("ray-")
        self._address = self._folder.path / "driver"
        self._process: subprocess.Popen[bytes] | None = None
        self._places: set[int] = set()
        self._left: list[int] = []  # of the placement group that there is at start

    @property
    def driver_pid(self) -> int | None:
        return self._process.pid if self._process else None

    def place(self, number: int) -> "RayPlace":
        """Those from 0 on, as many as the options count, are of one placement group. What has been
        left of it goes to those that come later.
        """
        if number >= self._options.count and self._left:
            number = self._left.pop()
        self._places.add(number)
        return RayPlace(self, number)

    async def open(self, **first: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to the driver, which begins with a line. Raises CannotLaunch if it has ended."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
        try:
            reader, writer = await asyncio.open_unix_connection(self._address)
        except OSError as error:
            raise CannotLaunch(LOST.how, killed=LOST.killed) from error
        writer.write(json.dumps(first).encode() + b"\n")
        return reader, writer

    def _started(self) -> "subprocess.Popen[bytes]":
        """A driver with a socket that it alone has: its end is the end of all who wait there."""
        self._address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self._address))
            listening.listen()
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", DRIVER, str(listening.fileno())),
                    json.dumps(asdict(self._options)),
                ],
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )

    async def release(self, number: int) -> None:
        self._places.remove(number)
        if number < self._options.count:
            self._left.append(number)
        elif self._places and self._process:
            with contextlib.suppress(CannotLaunch):  # what it held has ended with it
                _, writer = await self.open(remove=number)
                writer.close()
        if not self._places and self._process:
            process, self._process = self._process, None
            process.kill()  # it has nothing to save, and Ray takes back what it held
            await asyncio.to_thread(process.wait)
        if not self._places:
            self._folder.remove()


class RayPlace:
    """Room for one engine somewhere in the cluster, whichever runs there."""

    def __init__(self, hosts: RayHosts, number: int) -> None:
        self._hosts, self._number = hosts, number
        self._given_back = False

    async def launch(self, module: str) -> "RayEngine":
        reader, writer = await self._hosts.open(launch=module, place=self._number)
        try:
            told = await _line(reader)
            if "end" in told:
                how, killed = told["end"]
                raise CannotLaunch(how, killed=killed)
            pipe = await self._hosts.open(pipe=told["name"])
        except BaseException:
            writer.close()
            raise
        files = (lambda job: NO_FILES) if told["shared"] else self._hosts.files
        return RayEngine(told["pid"], reader, writer, pipe, files)

    async def close(self) -> None:
        if not self._given_back:  # an engine that could not start is ended again with its service
            self._given_back = True
            await self._hosts.release(self._number)


class RayEngine:
    def __init__(
        self,
        pid: int | None,
        told: asyncio.StreamReader,
        unwanted: asyncio.StreamWriter,
        pipe: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        files: FilesOf,
    ) -> None:
        self.pid = pid
        self._told, self._unwanted = told, unwanted
        self.reader, self.writer = pipe
        self._files = files

    def carried(self, job: object) -> JobFiles:
        return self._files(job)

    def kill(self) -> None:
        if not self._unwanted.is_closing():
            self._unwanted.write_eof()

    async def ended(self) -> End:
        told = asyncio.create_task(_line(self._told))
        await asyncio.wait({told}, timeout=EXIT_LIMIT_S)
        self.kill()
        try:
            return End(*(await told)["end"])
        finally:
            self._unwanted.close()


async def _line(reader: asyncio.StreamReader) -> dict[str, Any]:
    """What a driver says; if it is gone, that the engine is."""
    try:
        line = await reader.readline()
    except OSError:
        line = b""
    told: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {"end": LOST}
    return told

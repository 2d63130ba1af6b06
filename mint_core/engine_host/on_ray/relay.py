"""An engine's life, as its driver sees it: what passes between front and agent, and files."""

import asyncio
import contextlib
import json
import logging
import pickle
import struct
import time
from collections import OrderedDict
from pathlib import Path

from mint_core.engine_host import notes
from mint_core.engine_host.host import End
from mint_core.engine_host.on_ray.files import Arrival, send_file
from mint_core.engine_host.on_ray.frames import PIECE_BYTES, Kind, Link, PeerGone
from mint_core.engine_host.pipe import Heartbeat

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0  # while files move
CACHE_SHARE = 0.25  # of the free space on the engine's disk, for files of jobs that are done
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")  # lengths in the pipe

Stamp = tuple[int, int, int]  # inode, size and time: the same file while they are the same


def stamp_of(file: Path) -> Stamp:
    told = file.stat()
    return told.st_ino, told.st_size, told.st_mtime_ns


class Copies:
    """Which of the front's files an engine has."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._there: OrderedDict[str, Stamp] = OrderedDict()  # the least recently used first
        self.jobs: dict[int, notes.Before] = {}  # under way

    def has(self, path: str, stamp: Stamp) -> bool:
        if self._there.get(path) != stamp:
            return False
        self._there.move_to_end(path)
        return True

    def add(self, path: str, stamp: Stamp) -> None:
        self._there[path] = stamp
        self._there.move_to_end(path)

    def forget(self, path: str) -> None:
        self._there.pop(path, None)

    def dispensable(self) -> list[str]:
        """Takes out what exceeds the limit and no job needs."""
        needed = {p for job in self.jobs.values() for p in (*job.reads, *job.writes)}
        over = sum(size for _, size, _ in self._there.values()) - self._limit_bytes
        found = []
        for path in [path for path in self._there if path not in needed]:
            if over <= 0:
                break
            over -= self._there.pop(path)[1]
            found.append(path)
        return found


class Relay:
    def __init__(
        self,
        reader: asyncio.StreamReader,  # from and to the front
        writer: asyncio.StreamWriter,
        link: Link,
        free_bytes: int,
    ) -> None:
        self._reader, self._writer, self._link = reader, writer, link
        self._copies = Copies(int(CACHE_SHARE * free_bytes))
        self._whole = asyncio.Lock()  # taken within a message to the front
        self._beat_s = 0.0
        self._arrival: tuple[str, Arrival] | None = None
        self._refusal: OSError | None = None  # of the disk, for what is fetched

    async def run(self) -> End:
        """Until the engine has ended. Raises PeerGone if the agent is lost."""
        sending = asyncio.create_task(self._send_on())
        hearing = asyncio.create_task(self._hand_back())
        try:
            await asyncio.wait({sending, hearing}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # raises what kept it from sending on
            return await hearing
        finally:
            for task in (sending, hearing):
                task.cancel()
            await asyncio.wait({sending, hearing})
            self._abandon()
            self._writer.close()

    async def kill(self) -> None:
        await self._link.tell(Kind.KILL)

    async def _send_on(self) -> None:
        """What the front says, to the engine."""
        try:
            while True:
                header = await self._reader.readexactly(_SHORT.size)
                (length,) = _SHORT.unpack(header)
                if length == -1:
                    header += await self._reader.readexactly(_LONG.size)
                    (length,) = _LONG.unpack(header[_SHORT.size :])
                piece = await self._reader.readexactly(min(length, PIECE_BYTES))
                if piece.startswith(notes.MARK):
                    await self._note(notes.decode(piece))
                else:
                    await self._pass(header, piece, length - len(piece))
        except (EOFError, OSError):
            await self._link.tell(Kind.CLOSE)
        except PeerGone:
            pass  # told where the agent is listened to

    async def _pass(self, header: bytes, piece: bytes, left: int) -> None:
        async with self._link.turn:
            await self._link.put(Kind.PIECE, header + piece)
            while left:
                piece = await self._reader.readexactly(min(left, PIECE_BYTES))
                left -= len(piece)
                await self._link.put(Kind.PIECE, piece)

    async def _note(self, note: notes.Before | notes.After) -> None:
        match note:
            case notes.Before(number, reads, writes):
                self._copies.jobs[number] = note
                for path in reads:
                    await self._bring(path)
                if writes:
                    await self._link.tell(Kind.ROOM, writes)
            case notes.After(number, failed):
                job = self._copies.jobs[number]
                if failed or not job.writes:
                    del self._copies.jobs[number]
                    await self._drop([*job.writes, *self._copies.dispensable()])
                else:
                    await self._link.tell(Kind.GET, [number, job.writes])

    async def _bring(self, path: str) -> None:
        """What is not here shall not be there either: the engine says what that means."""
        file = Path(path)
        try:
            stamp = stamp_of(file)
            if self._copies.has(path, stamp):
                return
            beating = asyncio.create_task(self._keep_beating())
            try:
                await send_file(self._link, file, path)
            finally:
                beating.cancel()
            self._copies.add(path, stamp)
        except OSError as error:
            logger.warning("%s is not brought to the engine: %s", path, error.strerror)
            await self._drop([path])

    async def _drop(self, paths: list[str]) -> None:
        for path in paths:
            self._copies.forget(path)
        if paths:
            await self._link.tell(Kind.DROP, paths)

    async def _hand_back(self) -> End:
        """What the engine says, to the front, and the files that it has written to their places."""
        while True:
            kind, content = await self._link.take()
            if kind in (Kind.PIECE, Kind.LAST):
                await self._hand_on(kind, content)
            elif kind is Kind.ENDED:
                return End(*json.loads(content))
            elif kind is Kind.GOT:
                await self._fetched(*json.loads(content))
            else:
                await self._receive(kind, content)
                await self._beat()

    async def _hand_on(self, kind: Kind, content: bytes) -> None:
        """A whole message, whose pieces come without anything between."""
        async with self._whole:
            while True:
                self._writer.write(content)
                await self._drain()
                if kind is Kind.LAST:
                    return
                kind, content = await self._link.take()

    async def _receive(self, kind: Kind, content: bytes) -> None:
        try:
            if kind is Kind.FILE:
                path, mode = json.loads(content)
                self._arrival = path, await asyncio.to_thread(Arrival, Path(path), mode)
            elif self._arrival is not None:  # else it could not be begun
                path, arrival = self._arrival
                if kind is Kind.FILE_PIECE:
                    await asyncio.to_thread(arrival.add, content)
                else:
                    await asyncio.to_thread(arrival.finish, content)
                    self._arrival = None
                    self._copies.add(path, stamp_of(Path(path)))
        except OSError as error:
            self._refusal = self._refusal or error
            self._abandon()

    async def _fetched(self, number: int, error: int, strerror: str) -> None:
        refusal, self._refusal = self._refusal, None
        if refusal:
            error, strerror = refusal.errno or 5, refusal.strerror or ""
        job = self._copies.jobs.pop(number)
        await self._drop([*(job.writes if error else ()), *self._copies.dispensable()])
        await self._say(notes.Fetched(number, error, strerror))

    def _abandon(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival:
            arrival[1].abandon()

    async def _keep_beating(self) -> None:
        """While a file goes to the engine: as long as pieces pass, the connection lives."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._beat()

    async def _beat(self) -> None:
        if time.monotonic() - self._beat_s >= HEARTBEAT_S:
            self._beat_s = time.monotonic()
            await self._say(Heartbeat())

    async def _say(self, message: object) -> None:
        content = pickle.dumps(message)
        async with self._whole:
            self._writer.write(_SHORT.pack(len(content)) + content)
            await self._drain()

    async def _drain(self) -> None:
        """A front that is gone is no fault of the engine's, which is about to be told."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

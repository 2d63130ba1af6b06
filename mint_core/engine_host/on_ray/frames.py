"""What a driver and an agent say to each other, once TLS has told them who they are: frames of a
kind and bytes. No pickle is read here; those of front and engine pass through unopened.
"""

import asyncio
import json
import socket
import ssl
import struct
from enum import IntEnum
from typing import Any

_HEADER = struct.Struct("!BI")
PIECE_BYTES = 2**20  # of a message or file, at a time
_SILENCE_S = 30  # of a machine that is gone, until the connection is
_PROBES = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


class Kind(IntEnum):
    """Of a frame. In brackets, what it holds beside bytes: JSON."""

    PIECE = 1  # of a message between front and engine
    LAST = 2  # the same, and its last
    FILE = 3  # one begins: [path, mode]
    FILE_PIECE = 4
    FILE_END = 5  # SHA-256
    ROOM = 6  # folders for [paths]
    DROP = 7  # forget [paths]
    GET = 8  # send [number, paths]
    GOT = 9  # [number, error, strerror]: all of them are sent, if error is 0
    KILL = 10
    CLOSE = 11  # the front's end of the pipe is closed
    ENDED = 12  # [how, killed]: nothing is left of the engine


class PeerGone(Exception):
    """The connection is lost."""


class Link:
    """One side of a connection. Who writes holds the turn while nothing may come between."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.turn = asyncio.Lock()
        told = writer.get_extra_info("socket")
        told.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            told.setsockopt(socket.IPPROTO_TCP, option, value)
        told.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENCE_S)

    async def put(self, kind: Kind, content: bytes | memoryview = b"") -> None:
        """Writes a frame and waits until the peer keeps up. Raises PeerGone."""
        try:
            self._writer.writelines([_HEADER.pack(kind, len(content)), content])
            await self._writer.drain()
        except (OSError, ssl.SSLError) as error:
            raise PeerGone from error

    async def tell(self, kind: Kind, value: Any = None) -> None:
        async with self.turn:
            await self.put(kind, json.dumps(value).encode())

    async def take(self) -> tuple[Kind, bytes]:
        """The next frame. Raises PeerGone."""
        try:
            kind, length = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            return Kind(kind), await self._reader.readexactly(length)
        except (EOFError, OSError, ValueError) as error:
            raise PeerGone from error

    def close(self) -> None:
        self._writer.transport.abort()

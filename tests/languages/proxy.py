"""A proxy behind which calls are executed and their ends are never heard of."""

import asyncio
from collections.abc import Callable

from tests.harness.proxy import Proxy

HEADER_BYTES = 9  # of an HTTP/2 frame, whose length is in the first three
HEADERS, END_STREAM = 1, 1


class SwallowingProxy(Proxy):
    """`swallows` is asked with each call's number, from 1, when the call has ended upstream:
    whether the connection is cut in place of that end, which leaves the caller with an answer that
    is not known to be whole, or with none. It runs on the proxy's thread.
    """

    def __init__(self, target: str, swallows: Callable[[int], bool]) -> None:
        self._swallows = swallows
        self.calls = 0
        super().__init__(target)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                content = await reader.readexactly(int.from_bytes(header[:3]))
                if header[3] == HEADERS and header[4] & END_STREAM:
                    self.calls += 1
                    if self._swallows(self.calls):
                        return
                writer.write(header + content)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # an end is away

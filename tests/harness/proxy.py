"""A TCP proxy with the faults of networks: it cuts connections, delays what they carry, and
duplicates them, so that a server gets every request twice, at the same time.
"""

import asyncio
import threading
from collections.abc import Awaitable
from contextlib import suppress

CHUNK_BYTES = 64 * 1024


class Proxy:
    """Of one server, on a thread of its own. All methods are for other threads."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.delay_s = 0.0  # of every piece, in both directions
        self.duplicating = False  # of connections made from now on
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.address = self._do(self._listen())

    def cut(self) -> None:
        """Breaks all connections, as a reset does."""
        self._loop.call_soon_threadsafe(self._abort)

    def close(self) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Awaitable[str]) -> str:
        async def done() -> str:
            return await work

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(10)

    async def _listen(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def _stop(self) -> str:
        assert self._server is not None
        self._server.close()
        self._abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return ""

    def _abort(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both ends of a connection; a twin gets the same bytes, and nobody hears its answers."""
        writers = [writer]
        try:
            count = 2 if self.duplicating else 1
            servers = [await asyncio.open_connection(self._host, self._port) for _ in range(count)]
            writers += [to_server for _, to_server in servers]
            self._writers.update(writers)
            (answers, _), twins = servers[0], servers[1:]
            tasks = [
                asyncio.create_task(self._pump(reader, [each for _, each in servers])),
                asyncio.create_task(self._answer(answers, writer)),
            ]
            deaf = [asyncio.create_task(self._pump(twin, [])) for twin, _ in twins]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in (*tasks, *deaf):
                task.cancel()
        except OSError:
            pass  # the server is away
        finally:
            self._writers.difference_update(writers)
            for each in writers:
                each.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._pump(reader, [writer])

    async def _pump(
        self, reader: asyncio.StreamReader, writers: list[asyncio.StreamWriter]
    ) -> None:
        with suppress(OSError):
            while content := await reader.read(CHUNK_BYTES):
                await asyncio.sleep(self.delay_s)
                for writer in writers:
                    with suppress(OSError):
                        writer.write(content)
                for writer in writers:
                    with suppress(OSError):
                        await writer.drain()

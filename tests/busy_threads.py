"""An event loop whose own threads are all taken, as by others who wait for a disk or a store."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

LIMIT_S = 10.0


@asynccontextmanager
async def no_thread_free() -> AsyncIterator[None]:
    loop, gate = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(1))
    held = loop.run_in_executor(None, gate.wait)
    try:
        async with asyncio.timeout(LIMIT_S):
            yield
    finally:
        gate.set()
        await held

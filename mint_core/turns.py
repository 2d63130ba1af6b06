"""Work that tenants take turns at, however much each of them has asked for."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    """So many places at a time; where there are several, one tenant gets all but one of them. All
    methods belong to one event loop.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._most = max(1, places - 1)  # that one tenant gets
        self._taken: Counter[str] = Counter()
        # Who waits, in order, by tenant; whose turn comes next is first.
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {}

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """A place, once it is the tenant's turn. Who leaves before that takes none."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, {})[granted] = None
        self._grant()
        try:
            await granted
            yield
        finally:
            if granted.cancelled():
                self._leave(tenant, granted)
            else:
                self._free += 1
                self._taken[tenant] -= 1
                self._grant()

    def _grant(self) -> None:
        while self._free:
            ready = (tenant for tenant in self._waiting if self._taken[tenant] < self._most)
            if (tenant := next(ready, None)) is None:
                return
            granted = next(iter(self._waiting[tenant]))
            self._leave(tenant, granted)
            if not granted.cancelled():  # else its caller is about to say so
                self._free -= 1
                self._taken[tenant] += 1
                granted.set_result(None)

    def _leave(self, tenant: str, waiting: "asyncio.Future[None]") -> None:
        """Takes one out of a tenant's line; the rest of it comes behind the other tenants."""
        line = self._waiting.pop(tenant, {})
        line.pop(waiting, None)
        if line:
            self._waiting[tenant] = line


class Workers:
    """Threads for what blocks. All methods belong to one event loop."""

    def __init__(self, threads: int, name: str) -> None:
        self._turns = Turns(threads)
        self._threads = ThreadPoolExecutor(threads, name)

    async def run(
        self, tenant: str, function: Callable[..., T], /, *args: Any, **options: Any
    ) -> T:
        """Calls a function in a thread, when it is the tenant's turn. If the caller leaves before
        that, it is not called; what has begun is waited for.
        """
        async with self._turns.turn(tenant):
            call = partial(function, *args, **options)
            work = asyncio.get_running_loop().run_in_executor(self._threads, call)
            try:
                return await asyncio.shield(work)
            finally:
                while not work.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([work])

    def close(self) -> None:
        """Takes nothing more; what is under way may end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

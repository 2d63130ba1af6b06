"""Which adapters the engine holds. It has so many places, and memory for so many ranks.

What a request needs is fetched when it arrives, and goes to the engine when there is room: an
adapter that nobody uses makes it, the least recently used first. Whoever waits for room holds up
nobody whose adapter is there. If no adapter falls idle for a while, those that have been there for
longest take no more requests until they have had to go, so that all get their turn.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mint_core.engine_host.process import EngineProcess
from mint_core.lora.spec import stored_rank
from sampler_service.adapter_rows import AdapterRows, Row
from sampler_service.jobs import BASE_MODEL, DropAdapter, LoadAdapter, RowUnusable

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0  # how long an adapter waits for others to fall idle


@dataclass(slots=True, eq=False)
class _Held:
    """A revision in the engine, or on its way through the pipe."""

    revision_path: str
    ranks: int  # that it takes of the engine's memory
    number: int  # rises
    loading: "asyncio.Task[None]" = field(init=False)
    users: int = 0
    closing: bool = False  # takes no more users

    @property
    def failed(self) -> bool:
        loading = self.loading
        return loading.done() and (loading.cancelled() or loading.exception() is not None)

    @property
    def idle(self) -> bool:
        return not self.users and self.loading.done()


@dataclass(slots=True, eq=False)
class _Wish:
    """A revision that is wanted and has no place."""

    revision_path: str
    tenant: str
    granted: "asyncio.Future[_Held]"
    waiters: int = 0
    row: Row | None = None  # None: it is still being fetched
    ready_s: float = 0.0  # since when it waits for room

    @property
    def ranks(self) -> int:
        assert self.row is not None
        return stored_rank(self.row.rank)


class Adapters:
    """All methods belong to one event loop."""

    def __init__(self, rows: AdapterRows, engine: EngineProcess, *, capacity: int) -> None:
        self._rows = rows
        self._engine = engine
        self._capacity = capacity
        self._most_ranks = 0  # until the engine says how many
        self._life = engine.life  # of the engine that has what follows
        self._in_engine: dict[str, _Held] = {}
        self._wishes: dict[str, _Wish] = {}  # in order of arrival
        self._numbers = itertools.count(1)
        self._turns: dict[str, int] = {}  # when each tenant last got a place
        self._fetching: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def lease(self, path: str, tenant: str) -> AsyncIterator[str]:
        """The revision path of the adapter, which the engine has by the time it gets the next job
        for it, and keeps meanwhile; see `settled`. Raises a MintError if the path is not there for
        this tenant, or does not fit the base model.
        """
        if path == BASE_MODEL:
            yield BASE_MODEL
            return
        held = await self._hold(await self._rows.resolve(path, tenant), tenant)
        try:
            yield held.revision_path
        finally:
            held.users -= 1
            self._advance()

    async def settled(self, revision_path: str) -> None:
        """Raises why the engine does not have a leased adapter. If there is no reason, it has it
        now or was started anew: the job can be sent again, with a new lease.
        """
        held = self._held.get(revision_path)
        if held is not None:
            await asyncio.shield(held.loading)

    @property
    def _held(self) -> dict[str, _Held]:
        """By revision path, the least recently used first. An engine's successor holds nothing;
        what waits for a place goes there, since the last users of the one that died advance it.
        """
        if self._life != self._engine.life:
            self._life, self._in_engine = self._engine.life, {}
        return self._in_engine

    async def _hold(self, revision_path: str, tenant: str) -> _Held:
        """The revision's place, with one more user."""
        held = self._held.get(revision_path)
        if held is not None and not held.closing and not held.failed:
            self._use(held, 1)
            return held
        wish = self._wishes.get(revision_path)
        if wish is None:
            granted = asyncio.get_running_loop().create_future()
            wish = self._wishes[revision_path] = _Wish(revision_path, tenant, granted)
            task = asyncio.create_task(self._fetch(wish))
            self._fetching.add(task)
            task.add_done_callback(self._fetching.discard)
        wish.waiters += 1
        try:
            return await asyncio.shield(wish.granted)
        except asyncio.CancelledError:
            self._leave(wish)
            raise

    def _leave(self, wish: _Wish) -> None:
        """Takes note that one of those who waited is gone."""
        wish.waiters -= 1
        if wish.granted.done() and not wish.granted.exception():
            wish.granted.result().users -= 1
        elif not wish.waiters and self._wishes.get(wish.revision_path) is wish:
            del self._wishes[wish.revision_path]
        self._advance()

    async def _fetch(self, wish: _Wish) -> None:
        """Gets the row file ready, whether or not there is room."""
        try:
            row = await self._rows.row(wish.revision_path, wish.tenant)
            self._most_ranks = (await self._engine.hello()).adapter_ranks
        except Exception as error:
            if wish.waiters:
                del self._wishes[wish.revision_path]
                wish.granted.set_exception(error)
        else:
            wish.row, wish.ready_s = row, time.monotonic()
            self._advance()

    def _advance(self) -> None:
        """Gives places to those whose turn it is."""
        for held in [h for h in self._held.values() if h.idle and (h.closing or h.failed)]:
            self._drop(held)
        self._grant()
        self._close_for_overdue()
        self._grant()  # to those whose adapter need not go after all

    def _grant(self) -> None:
        while (wish := self._next()) and self._make_room(wish):
            del self._wishes[wish.revision_path]
            self._turns[wish.tenant] = next(self._numbers)
            wish.granted.set_result(self._place(wish))

    def _next(self) -> _Wish | None:
        """The wish to be granted next: tenants take turns, and each has its own in order."""
        ready = (w for w in self._wishes.values() if w.row is not None and not self._blocked(w))
        return min(ready, key=lambda wish: self._turns.get(wish.tenant, 0), default=None)

    def _blocked(self, wish: _Wish) -> bool:
        """Whether the adapter is there and has to go before it can come again."""
        held = self._held.get(wish.revision_path)
        return held is not None and (held.closing or held.failed)

    def _make_room(self, wish: _Wish) -> bool:
        while wish.revision_path not in self._held and not self._fits(wish.ranks):
            idle = next((h for h in self._held.values() if h.idle), None)
            if idle is None:
                return False
            self._drop(idle)
        return True

    @property
    def _ranks(self) -> int:
        return sum(held.ranks for held in self._held.values())

    def _fits(self, ranks: int) -> bool:
        return len(self._held) < self._capacity and self._ranks + ranks <= self._most_ranks

    def _place(self, wish: _Wish) -> _Held:
        assert wish.row is not None
        held = self._held.get(wish.revision_path)  # there again if it need not go after all
        if held is None:
            held = _Held(wish.revision_path, wish.ranks, next(self._numbers))
            # Begins before those who waited go on: the adapter is in the pipe before their jobs.
            held.loading = asyncio.create_task(self._load(held, wish.row, wish.tenant))
            held.loading.add_done_callback(lambda task: self._loaded(held, task))
            self._held[held.revision_path] = held
        self._use(held, wish.waiters)
        return held

    def _use(self, held: _Held, users: int) -> None:
        held.users += users
        self._held[held.revision_path] = self._held.pop(held.revision_path)

    def _drop(self, held: _Held) -> None:
        del self._held[held.revision_path]
        self._engine.cast(DropAdapter(held.revision_path))
        logger.info("adapter dropped path=%s", held.revision_path)

    async def _load(self, held: _Held, row: Row, tenant: str) -> None:
        path, started_s = held.revision_path, time.perf_counter()
        try:
            await self._engine.call(LoadAdapter(path, str(row.file)))
        except RowUnusable as error:
            logger.warning("%s; another file is made of it", error)
            row = await self._rows.own_row(path, tenant)
            await self._engine.call(LoadAdapter(path, str(row.file)))
        logger.info("adapter loaded path=%s s=%.4f", path, time.perf_counter() - started_s)

    def _loaded(self, held: _Held, task: "asyncio.Task[None]") -> None:
        if not task.cancelled():
            task.exception()  # retrieved: those who use it ask why with `settled`
        if self._held.get(held.revision_path) is held:
            self._advance()

    def _close_for_overdue(self) -> None:
        """Has as many adapters go as those need who have waited for too long."""
        if self._alarm is not None:
            self._alarm.cancel()
        now = time.monotonic()
        waiting = [
            w
            for w in self._wishes.values()
            if w.row is not None and w.revision_path not in self._held
        ]
        overdue = [w for w in waiting if now - w.ready_s >= PATIENCE_S]
        places = len(self._held) + len(overdue) - self._capacity
        ranks = self._ranks + sum(wish.ranks for wish in overdue) - self._most_ranks
        for held in sorted(self._held.values(), key=lambda held: held.number):
            held.closing = bool(overdue) and (places > 0 or ranks > 0)
            places, ranks = places - 1, ranks - held.ranks
        if patient := [w.ready_s for w in waiting if now - w.ready_s < PATIENCE_S]:
            rest_s = min(patient) + PATIENCE_S - now
            self._alarm = asyncio.get_running_loop().call_later(rest_s, self._advance)

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
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mint_core.engine_host.process import EngineProcess
from mint_core.hosting.tasks import Tasks
from sampler_service.adapters.coming import Coming
from sampler_service.adapters.revisions import Revision, Revisions
from sampler_service.jobs import BASE_MODEL, AdapterAbsent, DropAdapter, LoadAdapter, RowUnusable

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0  # how long an adapter waits for others to fall idle


@dataclass(slots=True, eq=False)
class _Held:
    """A revision in the engine, or on its way through the pipe."""

    revision: Revision
    number: int  # rises
    loaded: asyncio.Event = field(default_factory=asyncio.Event)  # or why it is not is known
    error: Exception | None = None  # why it is not
    users: int = 0
    closing: bool = False  # to make room for others

    @property
    def leaving(self) -> bool:
        """Whether it takes no more users."""
        return self.closing or self.error is not None

    @property
    def idle(self) -> bool:
        return not self.users and self.loaded.is_set()


@dataclass(slots=True, eq=False)
class _Wish:
    """A revision that is wanted and has no place."""

    revision: Revision
    granted: "asyncio.Future[_Held]"
    waiters: int = 0
    file: Path | None = None  # None: it is still being fetched
    ready_s: float = 0.0  # since when it waits for room


class AdapterLeases:
    """All methods belong to one event loop, in which `run` gives out the places."""

    def __init__(
        self, revisions: Revisions, engine: EngineProcess, tasks: Tasks, *, capacity: int
    ) -> None:
        self._revisions = revisions
        self._engine = engine
        self._tasks = tasks
        self._capacity = capacity
        self.most_ranks = 0  # until the engine says how many
        self._life = engine.life  # of the engine that has what follows
        self._in_engine: dict[str, _Held] = {}
        self._wishes: dict[str, _Wish] = {}  # by revision path, in order of arrival
        self._numbers = itertools.count(1)
        self._turns: dict[str, int] = {}  # when each tenant last got a place
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def lease(self, revision: Revision | None) -> AsyncIterator[str]:
        """The path of the revision, which the engine has by the time it gets the next job for it,
        and keeps meanwhile; None: the base model. Raises a MintError if its file cannot be had,
        and inside, where the engine has said AdapterAbsent, why it does. Without a reason it stays
        AdapterAbsent, as when it waited in vain: send the job again, with a new lease.
        """
        if revision is None:
            yield BASE_MODEL
            return
        held = await self._hold(revision)
        try:
            yield held.revision.path
        except AdapterAbsent:
            if self._held.get(held.revision.path) is held:
                await held.loaded.wait()
                if held.error is not None:
                    raise held.error from None
            raise
        finally:
            held.users -= 1
            self._changed.set()

    @property
    def _held(self) -> dict[str, _Held]:
        """By revision path, the least recently used first. An engine's successor holds nothing;
        what waits for a place goes there, once the last users of the one that died have left it.
        """
        if self._life != self._engine.life:
            self._life, self._in_engine = self._engine.life, {}
        return self._in_engine

    def coming(self, revision: Revision | None) -> Coming:
        """What it would cost to have a revision in the engine."""
        if revision is None:
            return Coming.THERE
        held = self._held.get(revision.path)
        if held is not None and not held.leaving:
            return Coming.THERE
        if max(self._lacking([revision])) <= 0:
            wished = revision.path in self._wishes
            return Coming.THERE if wished else Coming.INTO_FREE_PLACE
        idle = any(each.idle for each in self._held.values())
        return Coming.FOR_ANOTHER if idle else Coming.AFTER_OTHERS

    def abandon(self) -> None:
        """Has those who wait for a place go elsewhere: they get AdapterAbsent."""
        for wish in self._wishes.values():
            wish.granted.set_exception(AdapterAbsent("the engine is gone; send the call again"))
            wish.granted.exception()  # retrieved: perhaps nobody waits any more
        self._wishes.clear()

    async def run(self) -> None:
        """Gives places to those whose turn it is, whenever something has changed."""
        rest_s = None
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await self._changed.wait()
            self._changed.clear()
            for held in [h for h in self._held.values() if h.idle and h.leaving]:
                self._drop(held)
            self._grant()
            rest_s = self._close_for_overdue()
            self._grant()  # to those whose adapter need not go after all

    async def _hold(self, revision: Revision) -> _Held:
        """The revision's place, with one more user."""
        held = self._held.get(revision.path)
        if held is not None and not held.leaving:
            self._use(held, 1)
            return held
        wish = self._wishes.get(revision.path)
        if wish is None:
            granted = asyncio.get_running_loop().create_future()
            wish = self._wishes[revision.path] = _Wish(revision, granted)
            self._tasks.start(self._fetch(wish), f"fetch {revision.path}")
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
        elif not wish.waiters and wish.file is not None:
            self._forget(wish)
        self._changed.set()

    def _forget(self, wish: _Wish) -> None:
        """Waits no more for its place; there may be another wish for the same revision."""
        if self._wishes.get(wish.revision.path) is wish:
            del self._wishes[wish.revision.path]

    async def _fetch(self, wish: _Wish) -> None:
        """Gets the row file ready, whether or not there is room."""
        try:
            file = await self._revisions.file(wish.revision)
            self.most_ranks = (await self._engine.hello()).adapter_ranks
            wish.file, wish.ready_s = file, time.monotonic()
        except Exception as error:
            if wish.waiters and not wish.granted.done():
                wish.granted.set_exception(error)
        if wish.file is None or not wish.waiters:
            self._forget(wish)
        self._changed.set()

    def _grant(self) -> None:
        while (wish := self._next()) and self._make_room(wish):
            revision = wish.revision
            del self._wishes[revision.path]
            self._turns[revision.tenant] = next(self._numbers)
            held = self._held.get(revision.path)  # there again if it need not go after all
            if held is None:
                held = self._held[revision.path] = _Held(revision, next(self._numbers))
                # Begins before those who waited go on: it is in the pipe before their jobs.
                self._tasks.start(self._load(held, wish.file), f"load {revision.path}")
            self._use(held, wish.waiters)
            wish.granted.set_result(held)

    def _next(self) -> _Wish | None:
        """The wish to be granted next: tenants take turns, and each has its own in order."""
        leaving = {path for path, held in self._held.items() if held.leaving}  # to come again later
        ready = (w for p, w in self._wishes.items() if w.file is not None and p not in leaving)
        return min(ready, key=lambda wish: self._turns.get(wish.revision.tenant, 0), default=None)

    def _make_room(self, wish: _Wish) -> bool:
        while wish.revision.path not in self._held and max(self._lacking([wish.revision])) > 0:
            idle = next((h for h in self._held.values() if h.idle), None)
            if idle is None:
                return False
            self._drop(idle)
        return True

    def _lacking(self, wanted: Collection[Revision]) -> tuple[int, int]:
        """How many places and ranks are too few for all that is held, and these revisions."""
        revisions = [held.revision for held in self._held.values()] + list(wanted)
        ranks = sum(revision.stored_rank for revision in revisions)
        return len(revisions) - self._capacity, ranks - self.most_ranks

    def _use(self, held: _Held, users: int) -> None:
        held.users += users
        self._held[held.revision.path] = self._held.pop(held.revision.path)

    def _drop(self, held: _Held) -> None:
        del self._held[held.revision.path]
        self._engine.cast(DropAdapter(held.revision.path))
        logger.info("adapter dropped path=%s", held.revision.path)

    async def _load(self, held: _Held, file: Path | None) -> None:
        path, started_s = held.revision.path, time.perf_counter()
        try:
            try:
                await self._engine.call(LoadAdapter(path, str(file)))
            except RowUnusable as error:
                logger.warning("%s; another file is made of it", error)
                file = await self._revisions.own_file(held.revision)
                await self._engine.call(LoadAdapter(path, str(file)))
            logger.info("adapter loaded path=%s s=%.4f", path, time.perf_counter() - started_s)
        except Exception as error:
            held.error = error  # raised to those who use it
        held.loaded.set()
        self._changed.set()

    def _close_for_overdue(self) -> float | None:
        """Has as many adapters go as those need who have waited for too long. Returns in how many
        seconds the next one will have; None: nobody else waits.
        """
        now = time.monotonic()
        waiting = [
            w for path, w in self._wishes.items() if w.file is not None and path not in self._held
        ]
        overdue = [w for w in waiting if now - w.ready_s >= PATIENCE_S]
        places, ranks = self._lacking([wish.revision for wish in overdue])
        for held in sorted(self._held.values(), key=lambda held: held.number):
            held.closing = bool(overdue) and (places > 0 or ranks > 0)
            places, ranks = places - 1, ranks - held.revision.stored_rank
        rests = (w.ready_s + PATIENCE_S - now for w in waiting if now - w.ready_s < PATIENCE_S)
        return min(rests, default=None)

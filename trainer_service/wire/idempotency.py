"""Requests that act once: the same `request_id` of a tenant within 24 hours is the same request."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from mint_core.rpc.quotas import Account, QuotaBook
from trainer_service.errors import RequestIdReused
from trainer_service.wire.requests import Identity

REMEMBERED_S = 24 * 3600.0

T = TypeVar("T")
Act = Callable[[], Coroutine[Any, Any, T]]


@dataclass(slots=True, eq=False)
class _Work:
    task: asyncio.Task[Any]
    callers: int = 0


class Joined:
    """What is done once for all who ask for it meanwhile."""

    def __init__(self, *, goes_on: bool = False, linger_s: float = 0.0) -> None:
        """`goes_on`: also when all who have asked have left; else for so long."""
        self._goes_on = goes_on
        self._linger_s = linger_s
        self._under_way: dict[Hashable, _Work] = {}

    async def run(self, key: Hashable, act: Act[T]) -> T:
        work = self._under_way.get(key)
        if work is None:
            work = self._under_way[key] = _Work(asyncio.create_task(act()))
            work.task.add_done_callback(lambda task: self._drop(key, task))
        work.callers += 1
        try:
            result: T = await asyncio.shield(work.task)
            return result
        finally:
            work.callers -= 1
            if not self._goes_on and self._linger_s:
                asyncio.get_running_loop().call_later(self._linger_s, self._give_up, key, work)
            elif not self._goes_on and self._give_up(key, work):
                await asyncio.wait([work.task])

    def _give_up(self, key: Hashable, work: _Work) -> bool:
        """Ends what nobody waits for, and says whether that was so."""
        if work.callers or work.task.done():
            return False
        self._drop(key, work.task)  # nobody may join it any more
        work.task.cancel()
        return True

    async def ended(self, key: Hashable) -> None:
        """Waits until nothing is done for others."""
        if work := self._under_way.get(key):
            await asyncio.wait([work.task])

    def _drop(self, key: Hashable, task: "asyncio.Task[Any]") -> None:
        if key in self._under_way and self._under_way[key].task is task:
            del self._under_way[key]


@dataclass(slots=True, eq=False)
class _Entry:
    payload_hash: bytes
    since_s: float
    ended: bool = False
    answer: Any = None


def remembered_ids(book: QuotaBook) -> Account:
    """What counts the request ids of each tenant."""
    remedy = f"each is forgotten after {REMEMBERED_S / 3600:g} hours"
    return Account(book, "request_ids", "remembered request ids", remedy)


class Once:
    """Remembers the answers of requests. One that fails has changed nothing and is forgotten."""

    def __init__(
        self,
        ids: Account,
        clock: Callable[[], float] = time.time,
        *,
        goes_on: bool = True,
        linger_s: float = 0.0,
    ) -> None:
        """`ids` counts what is remembered; the rest is as in Joined."""
        self._ids = ids
        self._clock = clock
        self._entries: dict[tuple[str, str], _Entry] = {}  # oldest first
        self._joined = Joined(goes_on=goes_on, linger_s=linger_s)

    def recall(self, tenant: str, identity: Identity, since_s: float, answer: object) -> None:
        """Takes in an answer that was given before a restart."""
        entry = _Entry(identity.payload_hash, since_s, True, answer)
        self._keep((tenant, identity.request_id), entry)

    async def run(self, tenant: str, identity: Identity, act: Act[T], *, frees: bool = False) -> T:
        """Returns what `act` did when the request first came. Raises QuotaExceeded, but not for
        what `frees`: deletions always work.
        """
        self._forget_old()
        key = (tenant, identity.request_id)
        entry = self._entries.get(key)
        if entry is None:
            if not frees:
                self._ids.check(tenant, 1)
            entry = _Entry(identity.payload_hash, self._clock())
            self._keep(key, entry)
        if entry.payload_hash != identity.payload_hash:
            raise RequestIdReused(identity.request_id)

        async def answer() -> Any:
            try:
                entry.answer = await act()
            except BaseException:
                if self._entries.get(key) is entry:
                    self._forget(key)
                raise
            entry.ended = True
            return entry.answer

        result: T = entry.answer if entry.ended else await self._joined.run(key, answer)
        return result

    def look(self, tenant: str, request_id: str) -> Any:
        """The answer of a request; None while it is under way. KeyError if nobody has sent it."""
        self._forget_old()
        return self._entries[tenant, request_id].answer

    async def ended(self, tenant: str, identity: Identity) -> None:
        """Waits until nothing is done any more for others who have sent the request."""
        await self._joined.ended((tenant, identity.request_id))

    def _forget_old(self) -> None:
        horizon = self._clock() - REMEMBERED_S
        while self._entries:
            key, oldest = next(iter(self._entries.items()))
            if oldest.since_s > horizon:
                return
            self._forget(key)

    def _keep(self, key: tuple[str, str], entry: _Entry) -> None:
        self._entries[key] = entry
        self._ids.add(key[0], 1)

    def _forget(self, key: tuple[str, str]) -> None:
        del self._entries[key]
        self._ids.add(key[0], -1)

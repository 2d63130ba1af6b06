"""Requests that act once: the same `request_id` of a tenant within 24 hours is the same request."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer_service.errors import RequestIdReused
from trainer_service.wire.requests import Identity

REMEMBERED_S = 24 * 3600.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Entry:
    payload_hash: bytes
    task: asyncio.Future[Any]
    since_s: float


class Once:
    """Remembers the answers of requests. One that fails has changed nothing and is forgotten."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, str], _Entry] = {}  # oldest first

    def recall(self, tenant: str, identity: Identity, since_s: float, answer: object) -> None:
        """Takes in an answer that was given before a restart."""
        task: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        task.set_result(answer)
        key = (tenant, identity.request_id)
        self._entries[key] = _Entry(identity.payload_hash, task, since_s)

    async def run(
        self, tenant: str, identity: Identity, act: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """Returns what `act` did when the request first came; it goes on if the caller leaves."""
        self._forget_old()
        key = (tenant, identity.request_id)
        entry = self._entries.get(key)
        if entry is None:
            task = asyncio.create_task(act())
            entry = _Entry(identity.payload_hash, task, self._clock())
            self._entries[key] = entry
            task.add_done_callback(lambda task: self._forget_failed(key, task))
        elif entry.payload_hash != identity.payload_hash:
            raise RequestIdReused(identity.request_id)
        result: T = await asyncio.shield(entry.task)
        return result

    def _forget_failed(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        if task.cancelled() or task.exception() is not None:
            del self._entries[key]

    def _forget_old(self) -> None:
        horizon = self._clock() - REMEMBERED_S
        while self._entries:
            key, oldest = next(iter(self._entries.items()))
            if oldest.since_s > horizon or not oldest.task.done():
                return
            del self._entries[key]

"""Background tasks of a service. None dies unseen: an error that a task does not handle itself is
in the log at once, and ends the service.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Tasks:
    """All methods belong to one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failures: asyncio.Queue[BaseException] = asyncio.Queue()

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    async def failure(self) -> BaseException:
        """Waits for an error that a task has ended by, and returns it."""
        return await self._failures.get()

    async def stop(self) -> None:
        """Cancels all that still run, and waits for their ends."""
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.critical("the task `%s` has died", task.get_name(), exc_info=error)
        self._failures.put_nowait(error)

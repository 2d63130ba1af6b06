"""How many backwards a program asked for: what keeps a step from part of a batch."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class BackwardCount:
    """Counts what was asked for, whether or not it ever reached the server. Thread-safe."""

    def __init__(self, pending: int) -> None:
        self._count = pending
        self._clears = 0
        self._lock = threading.Lock()

    def add(self, count: int = 1) -> None:
        with self._lock:
            self._count += count

    def take(self) -> int:
        """The count for an optimizer step, which clears the gradient also when it is refused."""
        return self._cleared()[0]

    def clear(self) -> Callable[[Future[Any]], None]:
        """Clears the count for a call that clears the gradient if it succeeds.

        Returns what to call when it has ended: if it failed, and nothing else has cleared the
        count since, the backwards before it count again.
        """
        count, clears = self._cleared()

        def ended(call: Future[Any]) -> None:
            if call.exception() is not None:
                with self._lock:
                    self._count += count if self._clears == clears else 0

        return ended

    def _cleared(self) -> tuple[int, int]:
        with self._lock:
            count, self._count = self._count, 0
            self._clears += 1
            return count, self._clears

"""Threads that make blocking calls: an answer comes sooner that way than by gRPC's own thread.

Measured on 2 cores, `forward_backward` of 2,048 tokens against a server that computes nothing:
1.2 ms (95 % within 1.6 ms) instead of 1.9 ms (4.8 ms).
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

from mint.futures import APIFuture

T = TypeVar("T")

logger = logging.getLogger("mint")


class Callers:
    """A few daemon threads, started when first needed and kept. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.start_over()
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self.start_over)

    def start_over(self) -> None:
        """Forgets the threads, which a forked process does not have."""
        self._started = 0
        self._free = 0  # threads that wait and have not been promised a call
        self._lock = threading.Lock()
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def take(self, call: Callable[[], None]) -> bool:
        """Has a thread run `call` at once, unless all are busy."""
        with self._lock:
            if self._free:
                self._free -= 1
            elif self._started < self._most:
                name = f"mint-call-{self._started + 1}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._started += 1  # not before: an interrupt may come between
            else:
                return False
        self._calls.put(call)
        return True

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            except Exception:
                logger.exception("a call ended in an error of the client's own")
            del call  # or the last request and answer would be kept
            with self._lock:
                self._free += 1


callers = Callers(most=4)
_waiters = Callers(most=sys.maxsize)  # as many as wait at the same time


def on_thread(function: Callable[[], T]) -> APIFuture[T]:
    """Runs a function that blocks on a daemon thread that does nothing else meanwhile."""
    future: APIFuture[T] = APIFuture()

    def run() -> None:
        try:
            value = function()
        except BaseException as error:
            future.fail(error)
        else:
            future.succeed(value)

    _waiters.take(run)
    return future

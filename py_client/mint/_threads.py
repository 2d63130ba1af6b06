"""Daemon threads of the process, for what blocks, for what an interrupt must not break off, and for
what is due later.

Those of `concurrent.futures` do not do: a process that ends waits for them, though a call of theirs
may wait for an hour; an interrupt inside `submit` may leave a lock held that its threads want; and
a forked process would have a pool without threads.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger("mint")

OWN_ERROR = "a call ended in an error of the client's own"


class Threads:
    """So many threads at most, started when first needed and kept. Thread-safe."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self.start_over()
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self.start_over)

    def start_over(self) -> None:
        """Forgets the threads, which a forked process does not have."""
        self._started = 0
        self._free = 0  # threads that wait and have not been promised work
        self._lock = threading.RLock()  # a collection here may close a stream, which comes here too
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def run(self, function: Callable[[], None]) -> None:
        """Has a thread run `function` as soon as one is free; one thread keeps their order."""
        self._work.put(function)
        self._promise_one()

    def run_at_once(self, function: Callable[[], None]) -> bool:
        """Has a thread run `function` at once, unless all are busy."""
        with self._lock:
            if self._free <= 0 and self._started >= self._most:
                return False
            self._promise_one()
        self._work.put(function)
        return True

    def _promise_one(self) -> None:
        with self._lock:
            if self._free <= 0 and self._started < self._most:
                name = f"{self._name}-{self._started + 1}"
                threading.Thread(target=self._serve, name=name, daemon=True).start()
                self._started += 1  # not before: an interrupt may come between
            else:
                self._free -= 1

    def _serve(self) -> None:
        while True:
            function = self._work.get()
            try:
                function()
            except BaseException:  # a callback of the user's may even have called sys.exit
                logger.exception(OWN_ERROR)
            del function  # or the last request and answer would be kept
            with self._lock:
                self._free += 1


waiters = Threads("mint-wait", most=sys.maxsize)  # as many as wait at the same time

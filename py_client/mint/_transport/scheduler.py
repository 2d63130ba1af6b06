"""Runs functions later, on one daemon thread of the process that starts when it is first needed."""

import heapq
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable


class Scheduler:
    """A heap of due times and the thread that waits for the next one."""

    def __init__(self) -> None:
        self.start_over()
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self.start_over)

    def start_over(self) -> None:
        """Forgets the thread and its work, which a forked process does not have."""
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._thread: threading.Thread | None = None

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """`function` must be quick and must not raise."""
        with self._changed:
            due = time.monotonic() + delay_s
            heapq.heappush(self._due, (due, next(self._ids), function))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mint-resend", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due:
                    self._changed.wait()
                wait_s = self._due[0][0] - time.monotonic()
                if wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                function = heapq.heappop(self._due)[2]
            function()


scheduler = Scheduler()

"""Runs functions later, on one daemon thread of the process that starts when it is first needed."""

import logging
import sched
import threading
import time
from collections.abc import Callable

from mint._transport.threads import OWN_ERROR, Threads

logger = logging.getLogger("mint")


class Timer(Threads):
    """A schedule, and the thread that waits for what is due next. Thread-safe."""

    def __init__(self) -> None:
        super().__init__("mint-resend", most=1)

    def start_over(self) -> None:
        """Forgets what is due too, which is a matter of the process that forked."""
        super().start_over()
        self._schedule = sched.scheduler(time.monotonic)
        self._changed = threading.Event()
        self._waits = False

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """`function` must be quick. What it raises is logged, and nobody else hears of it."""
        self._schedule.enter(delay_s, 0, function)
        self._changed.set()
        if not self._waits:
            self.run(self._wait)
            self._waits = True  # not before: an interrupt may come between

    def _wait(self) -> None:
        while True:
            self._changed.clear()
            try:
                next_s = self._schedule.run(blocking=False)
            except BaseException:
                logger.exception(OWN_ERROR)
                continue  # with what is due after it
            self._changed.wait(next_s)


timer = Timer()

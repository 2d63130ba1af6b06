"""The thread that puts calls on the wire for the main thread, and those of runs for all.

Ctrl-C interrupts the main thread between any two steps. A call that had its number and was not sent
would keep all later ones waiting, and a lock of gRPC that was taken and not released would stop the
whole channel; on a thread of its own neither can happen.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger("mint")


class Sender:
    """One daemon thread, started when first needed. Thread-safe."""

    def __init__(self) -> None:
        self.start_over()
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self.start_over)

    def start_over(self) -> None:
        """Forgets the thread, which a forked process does not have."""
        self._started = False
        self._lock = threading.RLock()  # a collection here may close a stream, which comes here too
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def run(self, function: Callable[[], None]) -> None:
        """Has the thread run `function`, which must be quick."""
        self._work.put(function)
        with self._lock:
            if not self._started:
                threading.Thread(target=self._run, name="mint-send", daemon=True).start()
                self._started = True  # not before: an interrupt may come between

    def _run(self) -> None:
        while True:
            function = self._work.get()
            try:
                function()
            except Exception:
                logger.exception("a call ended in an error of the client's own")


sender = Sender()


def off_main_thread(function: Callable[[], None]) -> None:
    """Runs what calls gRPC: at once, but for the main thread on the sender's."""
    if threading.current_thread() is threading.main_thread():
        sender.run(function)
    else:
        function()

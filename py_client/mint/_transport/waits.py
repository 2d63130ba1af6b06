"""What a script waits for, said in the log when it takes long."""

import logging
import os
import time
from collections.abc import Callable

from mint._threads import off_main_thread, timer

logger = logging.getLogger("mint")

_FIRST_S = 10.0
_LOOK_S = 1.0


class Waits:
    """The calls to one server that have no answer yet. Thread-safe, without a lock.

    While none of them ends, a line says so: after 10 s, and then whenever a wait is twice as long
    as the last one told of, so that a script whose calls all take long is told once.
    """

    def __init__(self, target: str, told: Callable[[], bool]) -> None:
        """`told`: whether the log says already that no server is there."""
        self._target = target
        self._told = told
        self._begun: dict[object, tuple[str, float]] = {}  # in order: what it is, and since when
        self._said: dict[object, str] = {}  # what the server had to say about it
        self._moved_s = 0.0  # when a call ended
        self._next_s = _FIRST_S
        self._looking = 0  # in which process; one that was forked has no schedule

    def begin(self, call: object, what: str) -> None:
        """A call has been made."""
        self._begun[call] = what, time.monotonic()
        if self._looking != os.getpid():
            self._looking = os.getpid()
            off_main_thread(self._look_later)

    def said(self, call: object, words: str) -> None:
        """The server has said why a call has to wait."""
        if call in self._begun:
            self._said[call] = words

    def end(self, call: object) -> None:
        """A call has its outcome."""
        self._begun.pop(call, None)
        self._said.pop(call, None)
        self._moved_s = time.monotonic()

    def _look_later(self) -> None:
        timer.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = 0  # first, so that a call which begins now is not overlooked
        calls = self._begun.copy()
        if not calls:
            return
        self._looking = os.getpid()
        self._look_later()
        oldest, (what, since) = next(iter(calls.items()))
        waited_s = time.monotonic() - max(since, self._moved_s)
        if waited_s >= self._next_s and not self._told():
            self._next_s = 2.0 * waited_s
            others = f" and {len(calls) - 1} more" if len(calls) > 1 else ""
            why = self._said.get(oldest, "the server is there and has not answered yet")
            logger.warning(
                "waiting for %s%s: no answer from %s for %.0f s (%s)",
                *(what, others, self._target, waited_s, why),
            )

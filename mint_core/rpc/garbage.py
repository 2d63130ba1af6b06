"""What calls leave behind, looked for by its size.

gRPC makes a circle of references of each call that it aborts, and in it is what the call held: its
request. Python looks for circles when there are many new objects, however large they are.
"""

import asyncio
import ctypes
import gc
from contextvars import Context

NOTICED_BYTES = 2**20
COLLECT_BYTES = 2**25  # at once
LATER_S = 1.0  # by then the last calls have let go too
KEPT_BYTES = 2**20  # of what is freed, at the end of each heap
ALONE_BYTES = 2**18  # a block as large is in no heap and goes back at once
# GNU's C library: it gives back to the system what it keeps, and is told how much that may be.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: 0)
_tell = getattr(ctypes.CDLL(None), "mallopt", lambda option, number: 0)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
ARENAS = 2  # heaps that threads share


def give_back_what_is_freed() -> None:
    """The C library learns from one large request to keep up to 64 MiB in every thread's heap, for
    good. For a front, whose requests differ; an engine allocates the same again and again.
    """
    for option, number in (
        (_TRIM_THRESHOLD, KEPT_BYTES),
        (_MMAP_THRESHOLD, ALONE_BYTES),
        (_ARENA_MAX, ARENAS),
    ):
        _tell(option, number)


def spare_what_is_there() -> None:
    """Has collections leave alone what a service is made of: they take 0.5 ms then, not 14."""
    gc.collect()
    gc.freeze()


class Garbage:
    """Of one event loop."""

    def __init__(self) -> None:
        self._bytes = 0
        self._later: asyncio.TimerHandle | None = None

    def left(self, count: int) -> None:
        """Of a request whose call was refused."""
        self._bytes += count
        if self._bytes >= NOTICED_BYTES and self._later is None:
            loop = asyncio.get_running_loop()
            # In a context of its own: a call's own holds its caller, and so what it brought.
            self._later = loop.call_later(LATER_S, self._collect, context=Context())
        if self._bytes >= COLLECT_BYTES:
            self._bytes = 0
            gc.collect()

    def _collect(self) -> None:
        self._later, self._bytes = None, 0
        gc.collect()
        _trim(0)

"""Weights on huge pages: a product of few rows reads all of them, and would look up a page for each
4 KiB.
"""

import ctypes
import sys
import threading
from collections.abc import Sequence
from typing import Any

_PAGE = 2**21  # bytes
_COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1: at once, whatever pages are there now


def move_later(ranges: Sequence[tuple[int, int]], owner: Any) -> None:
    """Has the kernel move what lies in these ranges of addresses, of `owner`, to huge pages; on a
    thread, since it takes about 3 ms a MiB where memory is fresh. Without effect where the kernel
    has no such call, or no such pages.
    """
    if sys.platform == "linux":
        thread = threading.Thread(target=_move, args=(_whole(ranges), owner), daemon=True)
        thread.start()


def _whole(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The huge pages that hold them: what lies close together may share one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        start, stop = start // _PAGE * _PAGE, -(-stop // _PAGE) * _PAGE
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(stop, found[-1][1])
            found.pop()
        found.append((start, stop))
    return found


def _move(pages: Sequence[tuple[int, int]], owner: Any) -> None:
    madvise = ctypes.CDLL(None).madvise
    for start, stop in pages:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _COLLAPSE)

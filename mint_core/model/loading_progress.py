"""How far the loading of a base model is: in the log, and as a sign of life."""

import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import set_tqdm_hook

logger = logging.getLogger(__name__)

SAID_EVERY_S = 10.0


def told_bar(progress: Callable[[], None]) -> type:
    """A progress bar, as the libraries that fetch and load a model take one, that writes to the log
    and calls `progress` about once a second.
    """

    class Told(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread of its own

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._said = (0, 0)
            self._said_s = time.monotonic()
            fixed = {"file": io.StringIO(), "mininterval": 1.0, "miniters": 1, "disable": False}
            super().__init__(*args, **{**kwargs, **fixed, "leave": True})

        def display(self, msg: object = None, pos: object = None) -> bool:
            progress()
            said, now = (self.n, self.total), time.monotonic()
            is_due = self.n == self.total or now - self._said_s >= SAID_EVERY_S
            if self.n and is_due and said != self._said:
                self._said, self._said_s = said, now
                logger.info("%s: %s of %s", self._what(), *map(self._amount, said))
            return True

        def _what(self) -> str:
            return str(self.desc or "loading").removesuffix(": ")

        def _amount(self, n: float | None) -> str:
            if n is None:
                return "?"
            return f"{n / 2**30:.2f} GiB" if self.unit == "B" else f"{n:.0f}"

    return Told


@contextmanager
def weights_told(bar: type) -> Iterator[None]:
    """Has transformers report the weights that it loads."""
    before = set_tqdm_hook(lambda factory, args, kwargs: bar(*args, **kwargs))
    try:
        yield
    finally:
        set_tqdm_hook(before)

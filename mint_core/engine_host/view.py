"""What health, metrics and administrators see of an engine, or of several as one."""

import asyncio
from collections.abc import Mapping
from typing import Protocol


class EngineView(Protocol):
    """An `EngineProcess` is one by itself."""

    changed: asyncio.Event  # set when `ready` changes, for one reader who clears it

    @property
    def ready(self) -> bool:
        """Whether calls are worked at."""

    @property
    def restarts(self) -> int: ...

    @property
    def pids(self) -> tuple[int, ...]:
        """Of its processes on this host."""

    @property
    def memory_limits(self) -> Mapping[str, int]:
        """What it takes at most, in bytes, by what that is for."""

    def memory_limit(self, of: str) -> float: ...

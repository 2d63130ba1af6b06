"""Where engines run, as their fronts see it."""

import asyncio
from typing import NamedTuple, Protocol

EXIT_LIMIT_S = 2.0  # from the end of the pipe to the end of the process


class End(NamedTuple):
    """How an engine ended."""

    how: str  # a sentence
    killed: bool  # by the system, a hand or the loss of its machine, and not by its own doing


class CannotLaunch(Exception):
    """No engine can be made now. The message, a sentence, says why."""


class LaunchedEngine(Protocol):
    """An engine from its making to its end."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pid: int  # on the machine where it runs

    def kill(self) -> None:
        """Ends it at once, if it has not ended."""

    async def ended(self) -> End:
        """Waits, behind the end of the pipe, until nothing of it is left: what lives on after
        EXIT_LIMIT_S is killed.
        """


class EngineHost(Protocol):
    """Makes engines, one after the other."""

    async def launch(self, module: str) -> LaunchedEngine:
        """Has `python -m <module> <fd>` run, whose descriptor is the other end of the pipe. Raises
        CannotLaunch. A launch that is cancelled leaves nothing behind.
        """

    async def close(self) -> None:
        """Gives back what engines would run on. The last one has ended."""

"""Where engines run, as their fronts see it."""

import asyncio
from typing import NamedTuple, Protocol

from mint_core.engine_host.carried import JobFiles

EXIT_LIMIT_S = 2.0  # from the end of the pipe to the end of the process


class End(NamedTuple):
    """How an engine ended."""

    how: str  # a sentence
    killed: bool  # by the system, a hand or the loss of its machine, and not by its own doing


class CannotLaunch(Exception):
    """No engine can be made now. The message, a sentence, says why."""

    def __init__(self, why: str, *, killed: bool = False) -> None:
        super().__init__(why)
        self.end = End(why, killed)


class LaunchedEngine(Protocol):
    """An engine from its making to its end."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pid: int | None  # None: it runs on another machine

    def carried(self, job: object) -> JobFiles:
        """What has to be brought to it for a job, and fetched: nothing, if it has the front's disk.
        Then, in the pipe, `Before` goes in front of the job and `After` follows on its answer.
        """

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

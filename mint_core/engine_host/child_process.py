"""Engines as children of their front: on its machine, and gone with it."""

import asyncio
import socket
import subprocess
import sys

from mint_core.engine_host.carried import NO_FILES, JobFiles
from mint_core.engine_host.host import EXIT_LIMIT_S, CannotLaunch, End


class ChildProcesses:
    """The host that needs nothing but this machine."""

    async def launch(self, module: str) -> "ChildProcess":
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", module, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C is for the front, which ends its engine
                )
        except OSError as error:
            ours.close()
            raise CannotLaunch(f"the engine's process cannot be made: {error.strerror}") from error
        try:
            return ChildProcess(process, *await asyncio.open_connection(sock=ours))
        except BaseException:
            process.kill()
            process.wait()
            raise

    async def close(self) -> None:
        """Nothing is held here."""


class ChildProcess:
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self.reader, self.writer = reader, writer
        self.pid: int | None = process.pid

    def carried(self, job: object) -> JobFiles:
        return NO_FILES

    def kill(self) -> None:
        self._process.kill()

    async def ended(self) -> End:
        return how_it_ended(await asyncio.to_thread(await_end, self._process))


def await_end(process: subprocess.Popen[bytes]) -> int:
    """The status of a process that is about to end, or is ended here."""
    try:
        return process.wait(EXIT_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # a process without its pipe is of no use
        return process.wait()


def how_it_ended(status: int) -> End:
    told = f"exit code {status}" if status >= 0 else f"signal {-status}"
    return End(f"the engine ended with {told}", killed=status < 0)

"""The front's side of its engine: a child process, a pipe, a watchdog, another child when it dies.

The engine is disposable. Whatever ends it (a crash, an out-of-memory kill, a hang), the calls that
were with it fail with `EngineDied`, `life` rises, and a new process starts; calls made meanwhile
wait for it.
"""

import asyncio
import itertools
import logging
import pickle
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mint_core.engine_host.pipe import (
    Bundle,
    Call,
    Failure,
    Heartbeat,
    Hello,
    Part,
    Reply,
    Report,
)
from mint_core.errors import EngineDied, EngineFault, MintError, Unavailable

logger = logging.getLogger(__name__)

START_LIMIT_S = 1800.0  # loading a large base from a cold disk
EXIT_LIMIT_S = 2.0  # from the end of the pipe to the end of the process
RESTART_DELAY_S = 0.1  # doubled after each start that failed
MAX_RESTART_DELAY_S = 60.0
WATCH_INTERVAL_S = 0.5
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!iQ")  # lengths of messages in the pipe
_MOST_SHORT_BYTES = 2**31 - 1


class _Child(asyncio.Protocol):
    """One engine process, and our end of its pipe. Messages are framed as those of
    `multiprocessing.connection`, which is the engine's end.
    """

    def __init__(
        self,
        module: str,
        config: object,
        receive: Callable[["_Child", Any], None],
        bury: Callable[["_Child"], None],
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the front, which ends its engine
            )
        self.started_s = time.monotonic()
        self._config = config
        self._receive = receive
        self._bury = bury
        self._received = bytearray()
        self._lost = asyncio.Event()
        self._life = asyncio.create_task(self._live(ours))

    async def _live(self, ours: socket.socket) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        await self._lost.wait()
        await asyncio.to_thread(self._await_end)
        self._bury(self)

    async def kill(self) -> None:
        """Ends the process, and waits for that."""
        self.process.kill()
        await self._life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.send(self._config)

    def send(self, message: object) -> None:
        """What the pipe does not take now, it takes when it can."""
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        long = len(content) > _MOST_SHORT_BYTES
        length = _LONG.pack(-1, len(content)) if long else _SHORT.pack(len(content))
        self._transport.writelines([length, content])

    def data_received(self, data: bytes) -> None:
        self._received += data
        start = 0
        while (found := self._content(start)) is not None:
            message = pickle.loads(self._received[found])
            start = found.stop
            self._receive(self, message)
        del self._received[:start]

    def _content(self, start: int) -> slice | None:
        """Where a message's content is, if all of it is here."""
        if len(self._received) < start + _SHORT.size:
            return None
        (length,) = _SHORT.unpack_from(self._received, start)
        begin = start + _SHORT.size
        if length == -1:
            if len(self._received) < start + _LONG.size:
                return None
            _, length = _LONG.unpack_from(self._received, start)
            begin = start + _LONG.size
        return slice(begin, begin + length) if len(self._received) >= begin + length else None

    def connection_lost(self, error: Exception | None) -> None:
        self._lost.set()

    def _await_end(self) -> None:
        try:
            self.process.wait(EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # a process without its pipe is of no use
            self.process.wait()


@dataclass(slots=True)
class _Waiter:
    """Who waits for an answer."""

    future: asyncio.Future[Any]
    silence_limit_s: float
    on_part: Callable[[Any], None] | None
    parted: bool = False  # the engine goes on with the next call and with this one beside it
    aside: bool = False  # the rest of it takes its own time, and says nothing of the engine

    def take(self, part: object) -> None:
        self.parted = True
        self.aside |= part is None
        if self.future.done() or (part is None and self.on_part is None):
            return  # the caller has left, or has nothing to wait for
        try:
            assert self.on_part is not None, "the answer comes in parts, and nobody asked for them"
            self.on_part(part)
        except Exception as error:  # the caller's own, and nobody else's
            self.future.set_exception(error)

    def finish(self, value: object) -> None:
        if not self.future.done():
            self.future.set_result(value)

    def fail(self, error: MintError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class EngineProcess:
    """Calls into an engine that may die. All methods belong to one event loop."""

    def __init__(
        self,
        module: str,  # run as `python -m <module> <fd>`; see mint_core.engine_host.pipe
        config: object,
    ) -> None:
        self._module = module
        self._config = config
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiter] = {}
        self.report: Any = None  # what the engine has told of itself; None: nothing yet
        self._attempt: asyncio.Future[Hello] | None = None  # the start under way, due or done
        self._start_error: MintError | None = None
        self._child: _Child | None = None
        self._last_word = time.monotonic()
        self._why_killed = ""
        self._watchdog: asyncio.Task[None] | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._restart_delay_s = RESTART_DELAY_S
        self.restarts = 0
        self.life = 1  # of the engine that is up, or comes next: each has a number of its own
        self.closed = False
        self.changed = asyncio.Event()  # set when `ready` changes, for one reader who clears it

    @property
    def ready(self) -> bool:
        return self._child is not None and self._attempt is not None and self._attempt.done()

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child else None

    async def start(self) -> Hello:
        """Starts the engine and returns its first word. Raises what kept it from loading."""
        self._attempt = asyncio.get_running_loop().create_future()
        self._watchdog = asyncio.create_task(self._watch())
        self._spawn()
        try:
            return await self.hello()
        except BaseException as error:
            await self.close()
            if isinstance(error, Unavailable) and self._start_error:
                raise self._start_error from None
            raise

    async def hello(self) -> Hello:
        """Waits until the engine is up and returns what it said of itself."""
        assert self._attempt is not None, "start() comes first"
        return await asyncio.shield(self._attempt)

    async def call(
        self,
        job: object,
        *,
        silence_limit_s: float = 60.0,
        on_part: Callable[[Any], None] | None = None,
    ) -> Any:
        """Runs a job in the engine, which is killed if it says nothing for `silence_limit_s`.
        `on_part` is called with each part of the answer as it comes, in the engine's order and
        before this returns; what it raises, this raises.
        """
        while not self.ready:
            await self.hello()
        assert self._child is not None
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self._waiting:
            self._last_word = time.monotonic()
        self._waiting[number] = _Waiter(future, silence_limit_s, on_part)
        try:
            self._child.send(Call(number, job))
            return await future
        finally:
            self._waiting.pop(number, None)

    def cast(self, job: object) -> None:
        """Sends a job without waiting for an answer, such as the abort of another."""
        if self._child is not None and self.ready:
            self._child.send(Call(0, job))

    async def close(self) -> None:
        """Ends the engine. Calls that wait for it, and later ones, are Unavailable."""
        self.closed = True
        if self._restart:
            self._restart.cancel()
        if self._watchdog:
            self._watchdog.cancel()
        child, self._child = self._child, None
        gone = Unavailable("the server is shutting down; send the call again")
        self._fail_attempt(gone)
        for waiter in self._waiting.values():
            waiter.fail(gone)
        self.changed.set()
        if child:
            await child.kill()

    def _spawn(self) -> None:
        self._last_word = time.monotonic()
        self._child = _Child(self._module, self._config, self._receive, self._bury)

    def _receive(self, child: _Child, message: object) -> None:
        if child is not self._child:
            return
        self._last_word = time.monotonic()
        for each in message.messages if isinstance(message, Bundle) else (message,):
            self._handle(child, each)

    def _handle(self, child: _Child, message: object) -> None:
        match message:
            case Part(number, value):
                if waiter := self._waiting.get(number):
                    waiter.take(value)
            case Hello():
                assert self._attempt is not None
                self._attempt.set_result(message)
                self._restart_delay_s = RESTART_DELAY_S
                self.changed.set()
                start_s = self._last_word - child.started_s
                logger.info("engine ready pid=%d start_s=%.2f", child.process.pid, start_s)
            case Reply(number, value):
                if waiter := self._waiting.get(number):
                    waiter.finish(value)
            case Failure(0, error):
                self._start_error = error
            case Failure(number, error):
                if waiter := self._waiting.get(number):
                    waiter.fail(error)
            case Heartbeat():
                pass
            case Report(value):
                self.report = value
            case _:
                raise AssertionError(f"unknown message {message!r}")

    def _bury(self, child: _Child) -> None:
        if child is not self._child:
            return
        was_up = self.ready
        self._child = None
        self.report = None
        why = self._why_killed or f"the engine ended with {_exit(child.process.returncode)}"
        cause, self._start_error, self._why_killed = self._start_error, None, ""
        if was_up:
            self.life += 1
            self._mourn(f"{why}; another is starting")
        elif self.restarts == 0 and not self._restart:
            cause = cause or EngineFault(f"{why} while it started; its log says why")
            self._start_error = cause  # start() raises it; callers wait for the next server
            self.closed = True
            self._fail_attempt(Unavailable(f"the engine cannot start: {cause.message}"))
            return
        else:
            why = cause.message if cause else why
            self._fail_attempt(Unavailable(f"the engine cannot start again: {why}"))
            self._restart_delay_s = min(2 * self._restart_delay_s, MAX_RESTART_DELAY_S)
        logger.error("%s; starting another in %g s", why, self._restart_delay_s)
        loop = asyncio.get_running_loop()
        self._attempt = loop.create_future()
        self._restart = loop.call_later(self._restart_delay_s, self._respawn)
        self.changed.set()

    def _respawn(self) -> None:
        self.restarts += 1
        self._spawn()

    def _fail_attempt(self, error: MintError) -> None:
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.get_running_loop().create_future()
        self._attempt.set_exception(error)
        self._attempt.exception()  # retrieved: nobody need wait for it

    def _mourn(self, why: str) -> None:
        """Fails what was with an engine that died, and says which call it was at."""
        begun = (number for number, waiter in self._waiting.items() if not waiter.parted)
        at = next(begun, next(iter(self._waiting), None))
        for number, waiter in self._waiting.items():
            waiter.fail(EngineDied(why, at_work=number == at))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if self._child is None or self._why_killed:
                continue
            waiting = (waiter for waiter in self._waiting.values() if not waiter.aside)
            limits_s = (waiter.silence_limit_s for waiter in waiting)
            limit_s = max(limits_s, default=float("inf"))
            if not self.ready:
                limit_s = START_LIMIT_S
            silent_s = time.monotonic() - self._last_word
            if silent_s > limit_s:
                self._why_killed = f"the engine said nothing for {silent_s:.0f} s and was killed"
                self._child.process.kill()


def _exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"

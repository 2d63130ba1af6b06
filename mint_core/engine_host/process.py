"""The front's side of its engine: a process somewhere, a pipe, a watchdog, another when it dies.

The engine is disposable. Whatever ends it (a crash, an out-of-memory kill, a hang), the calls that
were with it fail with `EngineDied`, `life` rises, and a new process starts; calls made meanwhile
wait for it.
"""

import asyncio
import itertools
import logging
import pickle
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mint_core.engine_host import notes
from mint_core.engine_host.carried import JobFiles
from mint_core.engine_host.child_process import ChildProcesses
from mint_core.engine_host.host import CannotLaunch, End, EngineHost, LaunchedEngine
from mint_core.engine_host.pipe import Call, Failure, Heartbeat, Hello, Part, Reply, Report
from mint_core.errors import EngineDied, EngineFault, FailedPrecondition, MintError, Unavailable

logger = logging.getLogger(__name__)

START_LIMIT_S = 1800.0  # loading a large base from a cold disk
RESTART_DELAY_S = 0.1  # doubled after each start that failed
MAX_RESTART_DELAY_S = 60.0
MOST_KILLED_STARTS = 3  # until it is taken for the machine's word that no engine can start
WATCH_INTERVAL_S = 0.5
# Lengths of messages in the pipe, as the engine's end, `multiprocessing.connection`, writes them: a
# long one behind a short one of -1.
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")
_MOST_SHORT_BYTES = 2**31 - 1


@dataclass(slots=True)
class _Waiter:
    """Who waits for an answer."""

    future: asyncio.Future[Any]
    silence_limit_s: float
    on_part: Callable[[Any], None] | None
    parted: bool = False  # the engine goes on with the next call and with this one beside it
    aside: bool = False  # the rest of it takes its own time, and says nothing of the engine

    def take(self, message: Part | Reply | Failure) -> None:
        self.parted = self.parted or isinstance(message, Part)
        if self.future.done():
            return  # the caller has left
        match message:
            case Part(_, None):
                self.aside = True
                if self.on_part:
                    self.on_part(None)
            case Part(_, part):
                try:
                    assert self.on_part, "the answer comes in parts, and nobody asked for them"
                    self.on_part(part)
                except Exception as error:  # the caller's own, and nobody else's
                    self.future.set_exception(error)
            case Reply(_, value):
                self.future.set_result(value)
            case Failure(_, error):
                self.future.set_exception(error)


class EngineProcess:
    """Calls into an engine that may die. All methods belong to one event loop."""

    def __init__(
        self,
        module: str,  # run as `python -m <module> <fd>`; see mint_core.engine_host.pipe
        config: object,
        host: EngineHost | None = None,  # None: it is a child of this process
    ) -> None:
        self._module = module
        self._config = config
        self._host = host or ChildProcesses()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiter] = {}
        self._carried: dict[int, JobFiles] = {}  # of calls that the engine is at
        self._written: dict[int, Reply] = {}  # answers that count when their files are here
        self.memory_limits: Mapping[str, int] = {}  # of the engine that was last ready, in bytes
        self.report: Any = None  # what the engine has told of itself; None: nothing yet
        self._attempt: asyncio.Future[Hello] | None = None  # the start under way, due or done
        self._start_error: MintError | None = None
        self._engine: LaunchedEngine | None = None
        self._started_s = self._last_word = time.monotonic()
        self._why_killed = ""
        self._watchdog: asyncio.Task[None] | None = None
        self._lives: asyncio.Task[None] | None = None
        self.restarts = 0
        self.life = 1  # of the engine that is up, or comes next: each has a number of its own
        self.closed = False
        self.changed = asyncio.Event()  # set when `ready` changes, for one reader who clears it

    @property
    def ready(self) -> bool:
        return self._engine is not None and self._attempt is not None and self._attempt.done()

    @property
    def pid(self) -> int | None:
        return self._engine.pid if self._engine else None

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.pid,) if self.pid else ()

    def memory_limit(self, of: str) -> float:
        """Bytes that it takes at most for something."""
        return self.memory_limits.get(of, 0)

    async def start(self) -> Hello:
        """Starts the engine and returns its first word. Raises what kept it from loading."""
        self._attempt = asyncio.get_running_loop().create_future()
        self._watchdog = asyncio.create_task(self._watch())
        self._lives = asyncio.create_task(self._live())
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
        while not (self.ready and (engine := self._engine)):
            await self.hello()
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self._waiting:
            self._last_word = time.monotonic()
        self._waiting[number] = _Waiter(future, silence_limit_s, on_part)
        try:
            files = engine.carried(job)
            if files.reads or files.writes:
                self._note(engine, notes.Before(number, files.reads, files.writes))
                self._carried[number] = files
            self._send(engine, Call(number, job))
            return await future
        finally:
            self._waiting.pop(number, None)

    def cast(self, job: object) -> None:
        """Sends a job without waiting for an answer, such as the abort of another."""
        if self.ready and self._engine:
            self._send(self._engine, Call(0, job))

    async def close(self) -> None:
        """Ends the engine. Calls that wait for it, and later ones, are Unavailable."""
        self.closed = True
        if self._watchdog:
            self._watchdog.cancel()
        engine, self._engine = self._engine, None
        gone = Unavailable("the server is shutting down; send the call again")
        self._fail_attempt(gone)
        for number, waiter in self._waiting.items():
            waiter.take(Failure(number, gone))
        self.changed.set()
        if engine:
            engine.kill()
        elif self._lives:
            self._lives.cancel()
        if self._lives:
            await asyncio.wait({self._lives})
        await self._host.close()

    async def _live(self) -> None:
        """Runs an engine, and another whenever one has ended."""
        delay_s = RESTART_DELAY_S
        while True:
            try:
                end = await self._run()
            except Exception:  # callers wait for a next engine, or for the word that there is none
                logger.exception("the engine cannot be served")
                end = End("the engine's front failed at it", killed=False)
            if self.closed:
                return
            delay_s = RESTART_DELAY_S if self.ready else min(2 * delay_s, MAX_RESTART_DELAY_S)
            why = self._bury(end)
            if self.closed:
                return
            logger.error("%s; starting another in %g s", why, delay_s)
            if self._attempt is None or self._attempt.done():
                self._attempt = asyncio.get_running_loop().create_future()
            self.changed.set()
            await asyncio.sleep(delay_s)
            self.restarts += 1

    async def _run(self) -> End:
        """Runs one engine, and returns how it ended."""
        self._started_s = self._last_word = time.monotonic()
        try:
            self._engine = engine = await self._host.launch(self._module)
        except CannotLaunch as error:
            if not error.end.killed:
                self._start_error = FailedPrecondition(error.end.how)
            return error.end
        self._last_word = time.monotonic()
        try:
            self._send(engine, self._config)
            await self._listen(engine)
        finally:
            engine.writer.close()
            end = await engine.ended()
        return end

    def _send(self, engine: LaunchedEngine, message: object) -> None:
        self._write(engine, pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def _note(self, engine: LaunchedEngine, note: notes.Before | notes.After) -> None:
        self._write(engine, notes.encode(note))

    def _write(self, engine: LaunchedEngine, content: bytes) -> None:
        """What the pipe does not take now, it takes when it can."""
        long = len(content) > _MOST_SHORT_BYTES
        length = _SHORT.pack(-1) + _LONG.pack(len(content)) if long else _SHORT.pack(len(content))
        engine.writer.writelines([length, content])

    async def _listen(self, engine: LaunchedEngine) -> None:
        """Handles what the engine says until its end of the pipe is closed."""
        reader = engine.reader
        try:
            while True:
                (length,) = _SHORT.unpack(await reader.readexactly(_SHORT.size))
                if length == -1:
                    (length,) = _LONG.unpack(await reader.readexactly(_LONG.size))
                self._receive(engine, pickle.loads(await reader.readexactly(length)))
        except (EOFError, OSError):
            return
        except Exception:
            logger.exception("the engine said what its front does not understand")

    def _receive(self, engine: LaunchedEngine, message: object) -> None:
        if self.closed:
            return
        self._last_word = time.monotonic()
        for each in message if isinstance(message, list) else (message,):
            self._handle(engine, each)

    def _handle(self, engine: LaunchedEngine, message: object) -> None:
        match message:
            case Hello():
                assert self._attempt is not None
                self.memory_limits = message.memory_limits
                self._attempt.set_result(message)
                self.changed.set()
                start_s = self._last_word - self._started_s
                logger.info("engine ready pid=%s start_s=%.2f", self.pid, start_s)
            case Failure(0, error):
                self._start_error = error
            case Part():
                self._answer(message)
            case Reply(number) | Failure(number):
                files = self._carried.get(number)
                if files:
                    self._note(engine, notes.After(number, isinstance(message, Failure)))
                if files and files.writes and isinstance(message, Reply):
                    self._written[number] = message
                else:
                    self._carried.pop(number, None)
                    self._answer(message)
            case notes.Fetched(number, error, strerror):
                files, answer = self._carried.pop(number), self._written.pop(number)
                refusal = files.refusal(OSError(error, strerror)) if error else None
                self._answer(Failure(number, refusal) if refusal else answer)
            case Heartbeat():
                pass
            case Report(value):
                self.report = value
            case _:
                raise AssertionError(f"unknown message {message!r}")

    def _answer(self, message: Part | Reply | Failure) -> None:
        if waiter := self._waiting.get(message.number):
            waiter.take(message)

    def _bury(self, end: End) -> str:
        """Tells those who wait for an engine that has ended, and returns why it has."""
        was_up = self.ready
        self._engine = None
        self._carried.clear()
        self._written.clear()
        self.report = None
        killed = end.killed and not self._why_killed
        why = self._why_killed or end.how
        cause, self._start_error, self._why_killed = self._start_error, None, ""
        if was_up:
            self.life += 1
            self._mourn(f"{why}; another is starting")
        elif self.life == 1 and killed and not cause and self.restarts < MOST_KILLED_STARTS - 1:
            pass  # by the system or a hand: whoever waits for the first engine waits for the next
        elif self.life == 1:
            cause = cause or EngineFault(f"{why} while it started; its log says why")
            self._start_error = cause  # start() raises it; callers wait for the next server
            self.closed = True
            self._fail_attempt(Unavailable(f"the engine cannot start: {cause.message}"))
        else:
            why = cause.message if cause else why
            self._fail_attempt(Unavailable(f"the engine cannot start again: {why}"))
        return why

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
            waiter.take(Failure(number, EngineDied(why, at_work=number == at)))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if self._engine is None or self._why_killed:
                continue
            waiting = (waiter for waiter in self._waiting.values() if not waiter.aside)
            limits_s = (waiter.silence_limit_s for waiter in waiting)
            limit_s = max(limits_s, default=float("inf")) if self.ready else START_LIMIT_S
            silent_s = time.monotonic() - self._last_word
            if silent_s > limit_s:
                self._why_killed = f"the engine said nothing for {silent_s:.0f} s and was killed"
                self._engine.kill()

"""Starts `python -m MODULE` warm: out of a nursery, a process that has imported the libraries that
take seconds. What is ours each process imports by itself, and from there on it is as after a cold
start. A service has a nursery of its own beside it, so that its engine is its child.

Only what `started` starts is warm, where MINT_WARM_STARTS is 1 in the environment: in tests, unless
they are told 0. Benchmarks never are, since they measure processes as they are by themselves.
"""

import atexit
import ctypes
import fcntl
import functools
import gc
import importlib
import inspect
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

LOADED = (  # with what a tiny model is made of; all but our own stays
    "mint_core.hosting.service_main",
    "mint_core.text.__main__",
    "sampler_service.engine.engine",
    "sampler_service.service",
    "trainer_service.checkpoints.conversion",
    "trainer_service.engine.engine",
    "trainer_service.engine.merging",
    "trainer_service.service",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)
OURS = (
    *("checkpoint_store", "mint", "mint_chat", "mint_core", "mintrpc"),
    *("sampler_service", "tests", "trainer_service"),
)
READ_LATER = ("AWS_", "MINT_", "PYTEST_")  # variables that no library reads when it is imported
NURSERY = "tests.warm"
HAVE_A_NURSERY = ("_service", ".serve")
LONG = "-" * 4096  # room for the words of those that are born
ORDER_BYTES = 2**17
FREE = 1000  # no descriptor is as high, or higher
SUBREAPER = 36  # of prctl: it becomes the parent of its grandchildren when their own ends

_libc = ctypes.CDLL(None)


def started(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """As Popen does it, but warm where that may be."""
    possible = sys.platform == "linux" and os.environ.get("MINT_WARM_STARTS") == "1"
    if possible and _read_at_import(options.get("env") or os.environ) == _tests_nursery()[1]:
        return _Watched(command, **options)
    return subprocess.Popen(command, **options)


def children(pid: int) -> list[psutil.Process]:
    """Of a service: all that live, but its nursery."""
    words = {each: words_of(each) for each in psutil.Process(pid).children()}
    return [each for each, own in words.items() if own and NURSERY not in own]


def words_of(process: psutil.Process) -> list[str]:
    """Its command; none if it has died."""
    with suppress(psutil.NoSuchProcess):  # a zombie is one too
        return process.cmdline()
    return []


class _Born(subprocess.Popen):  # type: ignore[type-arg]
    """A process out of the service's nursery, whose child it is made."""

    nursery: socket.socket

    def _execute_child(self, *given: Any) -> None:
        """Replaces the part of Popen that forks."""
        forks = super()._execute_child  # type: ignore[misc]
        told = dict(zip(inspect.signature(forks).parameters, given, strict=True))
        python, words = told["args"][:2], list(told["args"][2:])
        if [*python] != [sys.executable, "-m"] or words[0].partition(".")[0] not in OURS:
            forks(*given)
            return
        passed = tuple(told["pass_fds"])
        pipes = (told["p2cread"], told["c2pwrite"], told["errwrite"])
        streams = [own if pipe == -1 else pipe for own, pipe in enumerate(pipes)]
        place = (dict(told["env"] or os.environ), told["cwd"] or os.getcwd())
        order = (words, *place, passed, told["process_group"] == 0)
        self.answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = [*streams, *passed, theirs.fileno()]
            _adopt(True)
            socket.send_fds(self.nursery, [pickle.dumps(order)], descriptors)
        self.pid = int(self.answer.recv(16))
        _adopt(False)  # what an engine leaves behind when it dies is nobody's to bury
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(told[end] for end in ends))  # type: ignore[attr-defined]


class _Watched(_Born):
    """A process out of the tests' nursery, which stays its parent and tells how it ends."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self.nursery = _tests_nursery()[0]
        super().__init__(*given, **options)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        try:
            status = self.answer.recv(16, socket.MSG_DONTWAIT if wait_flags else 0)
        except BlockingIOError:
            return 0, 0
        self.answer.close()
        return self.pid, int(status)

    def _internal_poll(self, _deadstate: Any = None, *_: Any) -> int | None:
        def waitpid(pid: int, flags: int) -> tuple[int, int]:
            return self._try_wait(flags)

        polled: int | None = super()._internal_poll(None, waitpid)  # type: ignore[misc]
        return polled


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(READ_LATER)}


@functools.cache
def environment() -> dict[str, str]:
    """As it is before tests change it: conftest asks first."""
    return dict(os.environ)


@functools.cache
def _tests_nursery() -> tuple[socket.socket, dict[str, str]]:
    """Where orders go, and what was in the environment that it imported libraries in."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", NURSERY, str(theirs.fileno()), LONG]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment())

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours, _read_at_import(environment())


def main() -> None:
    control = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in LOADED:
        importlib.import_module(name)
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    gc.collect()
    gc.freeze()  # collections would have each process copy the pages
    _serve(control, _fork)


def _serve(control: int, fork: Any) -> NoReturn:
    """Forks a process for each order, until nobody is left who gives any."""
    told: dict[int, tuple[int, int]] = {}  # pid and where its end is told, by a descriptor of it
    orders = socket.socket(fileno=control)
    while True:
        for ready in select.select([control, *told], [], [])[0]:
            if ready != control:
                pid, answer = told.pop(ready)
                os.write(answer, str(os.waitpid(pid, 0)[1]).encode())
                os.close(answer)
                os.close(ready)
                continue
            order, descriptors, _, _ = socket.recv_fds(orders, ORDER_BYTES, 16)
            if not order:
                os._exit(0)
            pid = fork()
            if not pid:
                orders.detach()
                _become(descriptors[:-1], *pickle.loads(order))
            *others, answer = descriptors
            for descriptor in others:
                os.close(descriptor)
            os.write(answer, str(pid).encode())
            if fork is _fork:
                told[os.pidfd_open(pid)] = pid, answer
            else:
                os.close(answer)


def _fork() -> int:
    return os.fork()


def _fork_for_the_front() -> int:
    """The child's own parent ends at once, so that the front becomes it."""
    reading, writing = os.pipe()
    if between := os.fork():
        os.close(writing)
        os.waitpid(between, 0)
        pid = int(os.read(reading, 16))
        os.close(reading)
        return pid
    between = os.getpid()
    if pid := os.fork():
        os.write(writing, str(pid).encode())
        os._exit(0)
    while os.getppid() == between:  # engines ask to end with their parent
        time.sleep(0.001)
    return 0


def _become(
    descriptors: list[int],
    words: list[str],
    environment: dict[str, str],
    folder: str,
    passed: tuple[int, ...],
    own_group: bool,
) -> NoReturn:
    """Is `python -m`, with those words, from here on."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, FREE) for descriptor in descriptors]
    os.closerange(3, FREE)
    for descriptor, place in zip(high, (0, 1, 2, *passed), strict=True):
        os.dup2(descriptor, place)
        os.close(descriptor)
    if own_group:
        os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if words[0].endswith(HAVE_A_NURSERY):
        _take_a_nursery()
    _rename([sys.executable, "-m", *words])
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    sys.exit()


def _adopt(orphans: bool) -> None:
    """Whether this process becomes the parent of those below it whose own has ended."""
    _libc.prctl(SUBREAPER, int(orphans), 0, 0, 0)


def _take_a_nursery() -> None:
    """For engines and what else a service runs beside it, or for the two services of a pair."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        ours.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _rename([sys.executable, "-m", NURSERY])
        _serve(theirs.detach(), _fork_for_the_front)
    theirs.close()
    _Born.nursery = ours
    subprocess.Popen = _Born  # type: ignore[misc]


def _rename(command: list[str]) -> None:
    """Has the system show a command as the process's."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    words = "\0".join(command).encode()[: end - begin - 1]
    ctypes.memmove(begin, words.ljust(end - begin, b"\0"), end - begin)


if __name__ == "__main__":
    main()

"""Compiles strangers' constraints first where nobody else is: in a process that may end.

Some schemas end llguidance (1.9.1: an integer between -2**63 and -2**63 + 1 overflows its stack),
others keep it for minutes (multipleOf 9999991, 2,500 patterns in one allOf), and nothing can tell
it to stop. What one process has compiled, another compiles too.

`python -m sampler_service.engine.drawing.constraint_trial FD` reads grammars from a pipe, and says
when it has survived one.
"""

import logging
import resource
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

logger = logging.getLogger(__name__)

MOST_CPU_S = 2  # of one constraint, plus one at most: the system counts whole seconds
MOST_MEMORY_BYTES = 2**30
STACK_BYTES = 2**20  # less than the engine's threads have: what fits here fits there


class ConstraintTrial:
    """One process for many constraints, and another after one that has ended it. For one thread at
    a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def survives(self, grammar: str) -> bool:
        """Whether a process that compiles the grammar, as llguidance reads it, lives on."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        try:
            self._pipe.send(grammar)
            self._pipe.recv()
            return True
        except (EOFError, OSError):
            self._end()
            logger.warning("a constraint ended its trial with %s", self._process.returncode)
            return False

    def _start(self) -> "subprocess.Popen[bytes]":
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._end = weakref.finalize(self, _end, process, self._pipe)
        self._pipe.recv()  # an EOFError if it cannot start
        return process


def _end(process: "subprocess.Popen[bytes]", pipe: Connection) -> None:
    pipe.close()
    process.kill()
    process.wait()


def limits() -> "LLParserLimits":
    """Some hundred milliseconds of compiling and about ten of looking for tokens: what needs more
    is refused, or fails alone.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


def _serve() -> None:
    from llguidance import LLMatcher, LLTokenizer

    pipe = Connection(int(sys.argv[1]))
    tokens = LLTokenizer("byte")  # what compiling takes does not depend on the vocabulary
    with suppress(EOFError):
        while True:
            pipe.send(None)  # alive
            grammar = pipe.recv()
            used = resource.getrusage(resource.RUSAGE_SELF)
            most_s = int(used.ru_utime + used.ru_stime) + 1 + MOST_CPU_S
            resource.setrlimit(resource.RLIMIT_CPU, (most_s, resource.RLIM_INFINITY))
            with suppress(Exception):  # a refusal, which the engine will meet too, and tell
                LLMatcher(tokens, grammar, log_level=0, limits=limits()).compute_bitmask()


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=_serve).start()


if __name__ == "__main__":
    main()

"""Places at which tests end a process, as a power cut would: between two writes of a promise.

`MINT_FAULT_POINT=journal:before-commit` kills the process when it first comes there,
`journal:before-commit@7` the seventh time, `journal:before-commit@7@FILE` only if there is no FILE
yet, which is made: an engine's successor inherits the variable and is to live. Nothing but tests
sets it.
"""

import os
import signal
from pathlib import Path

VARIABLE = "MINT_FAULT_POINT"
_POINT, _, _REST = os.environ.get(VARIABLE, "").partition("@")
_TIMES, _, _ONCE = _REST.partition("@")
_left = int(_TIMES or 1)


def inherited() -> dict[str, str]:
    """What a process that is not a child is to have in its environment."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


def fault_point(name: str) -> None:
    """Ends the process here if a test asked for it."""
    global _left
    if name != _POINT:
        return
    _left -= 1
    if _left:
        return
    if _ONCE:
        try:
            Path(_ONCE).touch(exist_ok=False)
        except FileExistsError:
            return  # a process has died for this test
    os.kill(os.getpid(), signal.SIGKILL)

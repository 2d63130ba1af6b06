"""Places at which tests end a process, as a power cut would: between two writes of a promise.

`MINT_FAULT_POINT=journal:before-commit` kills the process when it first comes there;
`journal:before-commit@7` the seventh time. Nothing else sets the variable. An engine inherits it
from its front, and the points of the two have different names.
"""

import os
import signal

_POINT, _, _TIMES = os.environ.get("MINT_FAULT_POINT", "").partition("@")
_left = int(_TIMES or 1)


def fault_point(name: str) -> None:
    """Ends the process here if a test asked for it."""
    global _left
    if name != _POINT:
        return
    _left -= 1
    if not _left:
        os.kill(os.getpid(), signal.SIGKILL)

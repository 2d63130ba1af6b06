"""What a forked process can do. Imported before gRPC is.

gRPC goes on in a child, and leaves its parent's connections alone, only where it was told so before
it was imported. Where it was not, a call in the child would hang, and the parent's calls with it.
"""

import os
import sys

_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"
_YES = ("yes", "Yes", "YES", "true", "True", "TRUE", "1")  # what gRPC takes for it


def _prepare() -> bool:
    """Tells gRPC that this process may fork; whether gRPC has heard it."""
    if "grpc" not in sys.modules:
        os.environ.setdefault(_VARIABLE, "1")
    return os.environ.get(_VARIABLE) in _YES


_prepared = _prepare()
_process = os.getpid()


def refuse_calls_that_would_hang() -> None:
    """Raises in a forked process whose gRPC does not know of the fork."""
    if not _prepared and os.getpid() != _process:
        raise RuntimeError(
            "this process was forked, and gRPC had been imported before `mint`: import `mint` "
            f"first, or set {_VARIABLE}=1, or start processes by `spawn`"
        )

"""What stands in the place of CUDA graphs where there are none."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from mint_core.model.recordings import NotRecorded, Pass


class PlainRecorder:
    """A replay computes the pass again."""

    def __init__(self, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.replays = 0
        self._around = around  # each replay

    def first(self, compute: Pass) -> None:
        compute()

    def record(self, compute: Pass) -> Pass:
        def replay() -> None:
            self.replays += 1
            with self._around():
                compute()

        return replay


class NoRoom(PlainRecorder):
    """Has no memory for graphs."""

    def record(self, compute: Pass) -> Pass:
        raise NotRecorded("out of memory")

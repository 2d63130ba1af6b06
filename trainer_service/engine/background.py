"""What an engine does beside its jobs: files are written while it computes."""

import queue
import threading
from collections.abc import Callable

from mint_core.engine_host.pipe import EnginePipe, Heartbeat, Part, Reply
from trainer_service.jobs import Copied

# What is left of a job when its row may change again. Calls what it is given now and then, and
# returns the job's answer.
Rest = Callable[[Callable[[], None]], object]


class Background:
    """A thread that does what is left of jobs, one after the other, and answers for the engine."""

    def __init__(self, pipe: EnginePipe) -> None:
        self._pipe = pipe
        self._queue: queue.SimpleQueue[tuple[int, Rest]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="background").start()

    def put(self, number: int, rest: Rest) -> None:
        """Has the rest of a call done and answered."""
        self._pipe.send(Part(number, Copied()))
        self._queue.put((number, rest))

    def _run(self) -> None:
        while True:
            number, rest = self._queue.get()
            try:
                answer = rest(lambda: self._pipe.send(Heartbeat()))
                self._pipe.send(Reply(number, answer))
            except BrokenPipeError:
                return  # the front is gone
            except Exception as error:
                self._pipe.fail(number, error)

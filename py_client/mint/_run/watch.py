"""Watches a run: one stream, opened again whenever it breaks."""

from typing import Any

from mint import types
from mint._transport.connection import Connection
from mint._transport.stream import Stream
from mintrpc.v1 import trainer_pb2


class RunWatch(Stream[types.RunEvent]):
    """What happens to a run, from now on: for `for` or `async for`, one reader.

    The first event is the run as it is; it is told again after each loss of the connection, since
    what happened meanwhile is not. The watch ends when the run is deleted or `close` is called,
    and goes on by itself when the server is away for a while. A wait that was interrupted goes on
    behind the scenes: ask for the next event, or `close`.
    """

    _awaited = False  # a run may rest for days

    def __init__(self, connection: Connection, training_run_id: str) -> None:
        request = trainer_pb2.WatchTrainingRunRequest(training_run_id=training_run_id)
        super().__init__(connection, connection.trainer.WatchTrainingRun, request)

    def _read(self, message: Any) -> types.RunEvent | None:
        return types.RunEvent.from_proto(message)

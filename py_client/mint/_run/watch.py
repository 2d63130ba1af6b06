"""Watches a run: one stream, opened again whenever it breaks."""

from typing import Any

from mint import types
from mint._transport.connection import Connection
from mint._transport.failures import Failure
from mint._transport.features import RESUME_WATCHES
from mint._transport.stream import Stream
from mintrpc.v1 import trainer_pb2


class RunWatch(Stream[types.RunEvent]):
    """What happens to a run, from now on: for `for` or `async for`, one reader.

    The first event is the run as it is. After a loss of the connection the watch goes on where it
    was, without an event left out or told twice, for as long as the server holds what happened: 30
    s, and not over a restart. Otherwise the run as it is comes again, and what happened meanwhile
    is not told. The watch ends when the run is deleted or `close` is called. A wait that was
    interrupted goes on behind the scenes: ask for the next event, or `close`.
    """

    _awaited = False  # a run may rest for days

    def __init__(self, connection: Connection, training_run_id: str) -> None:
        self._request = trainer_pb2.WatchTrainingRunRequest(training_run_id=training_run_id)
        self._resumes = RESUME_WATCHES in connection.offered()
        self._event_number = 0
        super().__init__(connection, connection.trainer.WatchTrainingRun, self._request)

    def _read(self, message: Any) -> types.RunEvent | None:
        self._event_number = message.event_number
        return types.RunEvent.from_proto(message)

    def _opening_again(self) -> None:
        self._request.resume_after = self._event_number if self._resumes else 0

    def _begins_anew(self, failure: Failure) -> bool:
        self._event_number = 0 if failure.reason == "EVENTS_GONE" else self._event_number
        return failure.reason == "EVENTS_GONE" and bool(self._request.resume_after)

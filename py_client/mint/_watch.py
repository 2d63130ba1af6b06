"""Watches a run: one stream, opened again whenever it breaks."""

import threading
import time
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc

from mint import types
from mint._async_names import on_thread
from mint._call import LONGEST_S, backoff_s, is_silence
from mint._connection import Connection
from mint._failures import Failure, failure_of
from mint.futures import APIFuture
from mintrpc.v1 import trainer_pb2


class RunWatch:
    """What happens to a run, from now on: for `for` or `async for`, one reader.

    The first event is the run as it is; it is told again after each loss of the connection, since
    what happened meanwhile is not. The watch ends when the run is deleted or `close` is called,
    and goes on by itself when the server is away for a while.
    """

    def __init__(self, connection: Connection, training_run_id: str) -> None:
        self._connection = connection
        self._request = trainer_pb2.WatchTrainingRunRequest(training_run_id=training_run_id)
        self._closed = threading.Event()
        self._silent_since: float | None = None
        self._breaks = 0  # of the connection, since the last event
        self._pending: APIFuture[types.RunEvent | None] | None = None
        self._stream: Any = self._open()

    def close(self) -> None:
        """Ends the watch, also for a reader that waits. From any thread."""
        self._closed.set()
        self._stream.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> types.RunEvent:
        event = self._next()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> types.RunEvent:
        # A wait that is given up loses nothing: the next one takes over what it waited for.
        pending = self._pending = self._pending or on_thread(self._next, "watch")
        try:
            event = await pending
        finally:
            if pending.done():
                self._pending = None
        if event is None:
            raise StopAsyncIteration
        return event

    def _next(self) -> types.RunEvent | None:
        """Waits for the next event; None: there will be none."""
        while not self._closed.is_set():
            try:
                message = next(self._stream)
            except StopIteration:
                self._closed.set()
            except grpc.RpcError as error:
                self._open_again(failure_of(error))
            else:
                self._connection.heard()
                self._silent_since, self._breaks = None, 0
                if event := types.RunEvent.from_proto(message):
                    return event
        return None

    def _open(self) -> Any:
        connection = self._connection
        attempt_s = LONGEST_S if connection.contacted else connection.patience_s
        method = partial(connection.trainer.WatchTrainingRun, metadata=connection.metadata)
        try:
            return method(self._request, timeout=attempt_s)
        except ValueError as error:  # the channel is closed, or headers are not legal
            raise connection.error(Failure(grpc.StatusCode.CANCELLED, str(error))) from None

    def _open_again(self, failure: Failure) -> None:
        """Waits a little and opens the stream anew. Raises what has ended it for good."""
        if self._closed.is_set():
            return
        connection = self._connection
        if is_silence(connection, failure) and not connection.closed:
            self._bear(failure)
        elif failure.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            self._closed.set()
            raise connection.error(failure) from None
        self._stream = self._open()
        if self._closed.is_set():  # `close` may have missed this stream
            self._stream.cancel()

    def _bear(self, failure: Failure) -> None:
        connection = self._connection
        if failure.reason:  # a server that is there and cannot work yet
            connection.reached()
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        connection.silent(self._silent_since, failure.message)
        silence_s = now - self._silent_since
        self._breaks += 1
        delay_s = backoff_s(self._breaks)
        if silence_s + delay_s >= connection.patience_s:
            self._closed.set()
            raise connection.error(failure, silence_s=silence_s) from None
        self._closed.wait(delay_s)

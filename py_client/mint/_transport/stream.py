"""A server's stream, opened again whenever it breaks, as an iterator with and without `async`."""

import threading
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, TypeVar

import grpc

from mint._forks import refuse_calls_that_would_hang
from mint._threads import off_main_thread
from mint._transport.call import LONGEST_S
from mint._transport.closing import Closing
from mint._transport.connection import Connection
from mint._transport.failures import Failure, error_of, failure_of
from mint._transport.silence import Silence
from mint.futures import APIFuture, on_thread

T = TypeVar("T")
_Code = grpc.StatusCode


class Stream(Closing, Iterator[T], AsyncIterator[T]):
    """What a server sends, for one reader at a time, on any thread or event loop."""

    _attaches = True  # whether a stream that is opened again goes on where it was
    _awaited = True  # whether somebody should hear of it when nothing comes for long

    def __init__(self, connection: Connection, method: Any, request: Any) -> None:
        refuse_calls_that_would_hang()
        self._connection = connection
        self._method = partial(method, request, metadata=connection.metadata)
        self._name = request.DESCRIPTOR.name.removesuffix("Request")
        self._closed = threading.Event()
        self._silence = Silence(connection, attaches=self._attaches)
        self._pending: APIFuture[T | None] | None = None
        self._rpc: Any = on_thread(self._open).result()

    def close(self) -> None:
        """Ends the stream, also for a reader that waits. From any thread."""
        if self._closed.is_set():
            return  # it is over, or the RPC is cancelled where it is opened
        self._closed.set()
        off_main_thread(self._rpc.cancel)

    def __next__(self) -> T:
        # Not in gRPC: an interrupt there would leave its locks held, and nothing would come again.
        pending = self._wanted()
        pending.exception()
        self._pending = None
        item = pending.result()
        if item is None:
            raise StopIteration
        return item

    async def __anext__(self) -> T:
        pending = self._wanted()
        try:
            item = await pending
        finally:
            if pending.done():
                self._pending = None
        if item is None:
            raise StopAsyncIteration
        return item

    def _wanted(self) -> APIFuture[T | None]:
        """The next item. A wait that is given up loses nothing: the next takes over its future."""
        self._pending = self._pending or on_thread(self._next)
        return self._pending

    @abstractmethod
    def _read(self, message: Any) -> T | None:
        """What a message holds; None: nothing for the reader."""

    def _opening_again(self) -> None:
        """Gets ready for another RPC."""

    def _begins_anew(self, failure: Failure) -> bool:
        """Whether a stream that cannot go on where it was is opened without that."""
        return False

    def _at_end(self) -> None:
        """The server has sent all. Raises if that cannot be."""

    def _next(self) -> T | None:
        """Waits for the next item; None: there will be none."""
        waits = self._connection.waits
        if self._awaited:
            waits.begin(self, self._name)
        try:
            return self._received()
        finally:
            waits.end(self)

    def _received(self) -> T | None:
        while not self._closed.is_set():
            try:
                message = next(self._rpc)
            except StopIteration:
                self._closed.set()
                self._at_end()
            except grpc.RpcError as error:
                self._open_again(failure_of(error))
            else:
                self._connection.heard()
                self._silence.end()
                if (item := self._read_or_close(message)) is not None:
                    return item
        return None

    def _read_or_close(self, message: Any) -> T | None:
        try:
            return self._read(message)
        except BaseException:
            self.close()  # what has been taken off the wire would be missing from what follows
            raise

    def _open(self) -> Any:
        connection = self._connection
        attempt_s = LONGEST_S if connection.contacted else connection.patience_s
        try:
            return self._method(timeout=attempt_s)
        except ValueError as error:  # the channel is closed, or headers are not legal
            failure = Failure(_Code.CANCELLED, str(error))
            raise error_of(connection.explained(failure)) from None

    def _open_again(self, failure: Failure) -> None:
        """Waits a little and opens the stream anew. Raises what has ended it for good."""
        if self._closed.is_set():
            return
        delay_s = self._silence.delay_s(failure, time.monotonic())
        if self._begins_anew(failure):
            delay_s = 0.0
        if delay_s is None:
            self._closed.set()
            raise error_of(self._silence.explained(failure)) from None
        if self._closed.wait(delay_s):
            return
        self._opening_again()
        self._rpc = self._open()
        if self._closed.is_set():  # `close` may have missed this RPC
            self._rpc.cancel()

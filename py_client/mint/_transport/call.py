"""One call, sent again until it has an answer."""

import logging
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from mint._forks import refuse_calls_that_would_hang
from mint._threads import OWN_ERROR, callers, off_main_thread, timer
from mint._transport.connection import Connection
from mint._transport.failures import Failure, error_of, failure_of
from mint._transport.features import check_offered
from mint._transport.silence import Silence
from mint.errors import APIError, APIResponseValidationError, InvalidInputError
from mint.futures import APIFuture

T = TypeVar("T")
U = TypeVar("U")

logger = logging.getLogger("mint")

LONGEST_S = 3600.0  # for work that ends with its connection
_ROOM_BYTES = 64  # what is added to a request after its size was checked
_Code = grpc.StatusCode


class Call(Generic[T]):
    """Sends `request` until there is an outcome, and gives it to `future`: what `convert` makes of
    the answer, or why there is none.
    """

    def __init__(
        self,
        connection: Connection,
        method: Any,
        request: Any,
        convert: Callable[[Any], T],
        *,
        future: APIFuture[T] | None = None,
        ended: Callable[[Any], None] | None = None,
        attaches: bool = True,
    ) -> None:
        """`ended` hears of the server's message or the failure instead of `future`, once, on any
        thread. It must not raise; if it does nevertheless, it is called again, with that.

        `attaches`: whether a call that is sent again goes on where it was.
        """
        self.request = request
        self.future: APIFuture[T] = APIFuture() if future is None else future
        self._connection = connection
        self._method = method
        self._convert = convert
        self._ended = ended
        self._attaches = attaches
        self._attempt_s = connection.settings.attempt_s if attaches else LONGEST_S
        self._rpc: Any = None
        self._cancelled = False
        self._silence = Silence(connection, attaches=attaches)
        self.explained: Callable[[Failure], Failure] = lambda failure: failure

    def then(self, convert: Callable[[T], U]) -> "Call[U]":
        """The same call, and what `convert` makes of its outcome."""
        first = self._convert
        return Call(
            self._connection, self._method, self.request, lambda answer: convert(first(answer))
        )

    def submit(self) -> APIFuture[T]:
        """Sends it. What goes wrong on this thread is raised; on any other, it ends the call."""
        refuse_calls_that_would_hang()
        if isinstance(self.request, Message):
            check_offered(self._connection, self.request)
        self._connection.waits.begin(self, self.name())
        future = self.future  # a call that has ended may have let go of it
        self._send()
        return future

    def ask(self) -> T:
        """Sends it and waits for the answer."""
        try:
            return self.submit().result()
        finally:
            self.cancel()  # the wait may have been interrupted

    def run_part(self, part: Callable[[], object]) -> None:
        """Runs a part of the call where nobody hears what it raises: that ends the call."""
        try:
            part()
        except BaseException as error:
            self._end(broken_off(self._connection, error))

    def cancel(self) -> None:
        """Ends the RPC and sends no more; there is still an outcome."""
        self._cancelled = True
        if self._rpc is not None:
            off_main_thread(self._rpc.cancel)

    def settle(self, outcome: Any) -> None:
        """Gives the future its outcome."""
        if isinstance(outcome, Failure):
            self.future.fail(error_of(self.explained(outcome)))
            return
        try:
            value = self._convert(outcome)
        except APIError as error:
            self.future.fail(error)
        except Exception as unexpected:
            message = f"the answer cannot be read: {unexpected!r}"
            self.future.fail(APIResponseValidationError(message))
        else:
            self.future.succeed(value)

    def name(self) -> str:
        """That of its RPC."""
        return str(self.request.DESCRIPTOR.name).removesuffix("Request")

    def before_attempt(self) -> None:
        """Brings the request up to date; for subclasses."""

    def waits_for_another(self) -> bool:
        """Whether a SEQUENCE_GAP will close by itself; for subclasses."""
        return False

    def _end(self, outcome: Any) -> None:
        self._connection.waits.end(self)
        (self._ended or self.settle)(outcome)

    def _send(self) -> None:
        if self._cancelled:  # while it waited to be sent again
            self._fail(Failure(_Code.CANCELLED, "cancelled"))
            return
        self.before_attempt()
        self._sent = time.monotonic()
        connection = self._connection
        attempt_s = self._attempt_s if connection.contacted else connection.patience_s
        attempt = partial(self.run_part, partial(self._attempt, attempt_s))
        if not (self._attaches and callers.run_at_once(attempt)):
            off_main_thread(partial(self.run_part, partial(self._post, attempt_s)))

    def _post(self, attempt_s: float) -> None:
        """Begins an attempt that gRPC's own thread will end."""
        connection = self._connection
        try:
            rpc = self._method.future(self.request, timeout=attempt_s, metadata=connection.metadata)
        except ValueError as error:
            self._not_sent(error)
            return
        self._rpc = rpc
        if self._cancelled:
            rpc.cancel()
        rpc.add_done_callback(lambda rpc: self.run_part(partial(self._attempt_ended, rpc)))

    def _attempt(self, attempt_s: float) -> None:
        """Makes an attempt on this thread. It cannot be cancelled."""
        try:
            answer = self._method(
                self.request, timeout=attempt_s, metadata=self._connection.metadata
            )
        except grpc.RpcError as error:
            self._attempt_failed(failure_of(error))
        except ValueError as error:
            self._not_sent(error)
        else:
            self._answered(answer)

    def _attempt_ended(self, rpc: Any) -> None:
        if rpc.code() is _Code.OK:
            self._answered(rpc.result())
        else:
            self._attempt_failed(failure_of(rpc))

    def _answered(self, answer: Message) -> None:
        self._connection.heard()
        self._end(answer)

    def _not_sent(self, error: ValueError) -> None:
        """The channel is closed, or headers are not legal."""
        self._fail(Failure(_Code.CANCELLED, str(error)))

    def _attempt_failed(self, failure: Failure) -> None:
        if self._cancelled:
            self._fail(failure)
            return
        delay_s = self._silence.delay_s(failure, self._sent)
        if failure.reason == "SEQUENCE_GAP" and self.waits_for_another():
            delay_s = self._silence.backoff_s()
        if delay_s is None:
            self._fail(failure)
        else:
            self._connection.waits.said(self, failure.message)
            timer.call_later(delay_s, partial(self.run_part, self._send))

    def _fail(self, failure: Failure) -> None:
        self._end(self._silence.explained(failure))


def broken_off(connection: Connection, error: BaseException) -> Failure:
    """What a call comes to by a fault of this client's own, which is logged."""
    logger.error(OWN_ERROR, exc_info=error)
    failure = Failure(_Code.UNKNOWN, f"{OWN_ERROR}, which is in the log: {error!r}")
    return connection.explained(failure)


def check_size(connection: Connection, request: Message, field: str) -> None:
    """Refuses a request that the server would not take. Nothing has been sent then."""
    check_offered(connection, request)
    size_bytes = request.ByteSize() + _ROOM_BYTES
    if size_bytes > connection.max_message_bytes:
        raise InvalidInputError(
            f"the request takes {size_bytes} bytes, more than the "
            f"{connection.max_message_bytes} that the server takes; give fewer or shorter entries "
            f"of `{field}` per call",
            field=field,
        )


def new_request_id() -> str:
    """An id under which the server knows a request again that is sent twice."""
    return uuid.uuid4().hex

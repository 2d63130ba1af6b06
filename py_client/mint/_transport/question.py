"""A call that is to be made: what is asked, and how the answer is read."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from mint._transport.call import Call, settle
from mint._transport.connection import Connection
from mint.futures import APIFuture

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """`request`, which `method` of a server answers with what `convert` reads."""

    connection: Connection
    method: Any
    request: Message
    convert: Callable[[Any], T]

    def then(self, convert: Callable[[T], U]) -> "Question[U]":
        """The same question, and what `convert` makes of the answer to it."""
        return Question(
            self.connection,
            self.method,
            self.request,
            lambda answer: convert(self.convert(answer)),
        )

    def submit(self) -> APIFuture[T]:
        """Sends it."""
        future: APIFuture[T] = APIFuture()
        self.call(partial(settle, future, self.convert)).start()
        return future

    def ask(self) -> T:
        """Sends it and waits for the answer."""
        future: APIFuture[T] = APIFuture()
        call = self.call(partial(settle, future, self.convert))
        call.start()
        try:
            return future.result()
        finally:
            call.cancel()  # the wait may have been interrupted

    def call(self, ended: Callable[[Any], None]) -> Call[Any, Any]:
        """The call, not sent yet. `ended` is given the server's message, or why there is none."""
        return Call(self.connection, self.method, self.request, ended)


def new_request_id() -> str:
    """An id under which the server knows a request again that is sent twice."""
    return uuid.uuid4().hex

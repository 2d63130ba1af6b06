"""How long a server that does not answer is borne, and when it is asked again."""

import random
import time

import grpc

from mint._transport.connection import Connection
from mint._transport.failures import Failure

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 5.0
_Code = grpc.StatusCode


class Silence:
    """What one call has borne of its server since that last answered."""

    def __init__(self, connection: Connection, *, attaches: bool) -> None:
        """`attaches`: whether a call that is sent again goes on where it was."""
        self._connection = connection
        self._attaches = attaches
        self._since: float | None = None
        self._backoffs = 0

    def end(self) -> None:
        """The server has answered."""
        self._since = None

    def delay_s(self, failure: Failure, since: float) -> float | None:
        """Seconds until the call is sent again; None: it is not.

        `since`: a `time.monotonic()` from which nothing has been heard, if it was heard before.
        """
        if self._connection.closed:
            return None
        if _is_silence(self._connection, failure):
            return self._borne_s(failure, since)
        self._connection.heard()
        self.end()
        if failure.code is _Code.DEADLINE_EXCEEDED:
            return 0.0 if self._attaches else None
        if failure.code is _Code.RESOURCE_EXHAUSTED and failure.retry_after_s is not None:
            return max(failure.retry_after_s, _FIRST_BACKOFF_S)  # as a server that is full wants it
        return None

    def _borne_s(self, failure: Failure, since: float) -> float | None:
        """Seconds until the server is asked again; None: the silence has lasted for too long."""
        connection = self._connection
        if failure.reason:  # a server that is there and cannot work yet
            connection.contacted = True
        if self._since is None:
            self._since, self._backoffs = since, 0
        if connection.trouble():
            return None
        connection.silent(self._since, failure.message)
        delay_s = self.backoff_s()
        ends = self._since + connection.patience_s
        return delay_s if time.monotonic() + delay_s < ends else None

    def backoff_s(self) -> float:
        """How long to wait after one more attempt that came to nothing."""
        self._backoffs += 1
        longest = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** (self._backoffs - 1))
        return longest * random.uniform(0.5, 1.0)

    def explained(self, failure: Failure) -> Failure:
        """What a call comes to that is not sent again."""
        lasted_s = 0.0  # if the failure is a server's own word
        if self._since is not None and not failure.reason:
            lasted_s = time.monotonic() - self._since
        return self._connection.explained(failure, silence_s=lasted_s)


def _is_silence(connection: Connection, failure: Failure) -> bool:
    """Whether nothing tells that the server is there. While it is, it answers the channel's
    pings, and a call that takes long ends its attempt by the deadline."""
    if failure.code is _Code.DEADLINE_EXCEEDED:
        return not connection.contacted
    broken = failure.code is _Code.INTERNAL and "RST_STREAM" in failure.message
    return broken or failure.code in (_Code.UNAVAILABLE, _Code.CANCELLED)

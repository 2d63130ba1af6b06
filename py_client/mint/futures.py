"""The outcomes of calls, as standard futures that can also be awaited, on any event loop."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from mint._threads import waiters
from mint.errors import APITimeoutError, MintError
from mint.types import PromptAltTokens, SampledSequence, SampleResponse, TensorData, Topk

T = TypeVar("T")
_LOOK_S = 0.5


class _End(type(threading.RLock())):  # type: ignore[misc]
    """What a future has for a condition. An interrupt never leaves it held, as it may a
    `threading.Condition`, which is entered in several steps of Python: a thread that brought the
    outcome would wait for it for good.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()

    def notify_all(self) -> None:
        """There is an outcome: the standard future says so while it holds this."""
        if self._gate.locked():
            self._gate.release()

    def wait(self, timeout_s: float) -> None:
        """Returns when there is an outcome, or after a while. Not to be called while this is held.

        Not much later than after _LOOK_S: a signal that comes just before the wait begins, or to
        another thread, does not break the wait off, and its handler would run at its end alone.
        """
        if self._gate.acquire(timeout=min(timeout_s, _LOOK_S)):
            self._gate.release()  # for the next that waits


class APIFuture(Future[T]):
    """The outcome of a call that was sent. A timeout abandons the wait, never the call.

    Callbacks run in their order, on a thread of their own where they may wait for other calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self._prepare()
        self.set_running_or_notify_cancel()  # sent: from here on it cannot be cancelled

    def _prepare(self) -> None:
        self._condition = _End()
        self._done_callbacks: list[Callable[[Future[T]], object]] = []  # a user's
        self._followers: list[Callable[[Future[T]], object]] = []  # ours

    def result(self, timeout: float | None = None) -> T:
        """Waits for the outcome. Raises APITimeoutError after `timeout` seconds; ask again then."""
        self._wait_until_done(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `result`, but returns what `result` would raise, or None."""
        self._wait_until_done(timeout)
        return super().exception(0)

    def check_wait(self) -> None:
        """Raises where a wait would keep the outcome from ever coming."""

    def _wait_until_done(self, timeout: float | None) -> None:
        if not self.done():
            self.check_wait()
        ends_s = math.inf if timeout is None else time.monotonic() + timeout
        while not self.done():
            if (left_s := ends_s - time.monotonic()) <= 0:
                raise _no_answer_within(timeout)
            self._condition.wait(left_s)

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, for event loops."""
        try:
            async with asyncio.timeout(timeout):
                return await self
        except MintError:
            raise
        except TimeoutError:
            pass
        raise _no_answer_within(timeout)

    def future(self) -> Future[T]:
        """This future itself, which is a standard one."""
        return self

    async def coroutine(self) -> T:
        """Awaits the outcome; for `asyncio.create_task`."""
        return await self

    def __await__(self) -> Generator[Any, None, T]:
        if not self.done():
            self.check_wait()
            yield from self._wait().__await__()
        if self.cancelled():
            raise asyncio.CancelledError
        return self.result(0)

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def wake(_: Future[T]) -> None:
            try:
                loop.call_soon_threadsafe(ended.set)
            except RuntimeError:
                return  # the loop has closed: nobody waits any more

        self.when_done(wake)
        await ended.wait()

    # What transports call, from any thread.

    def when_done(self, follow: Callable[[Future[T]], object]) -> None:
        """As `add_done_callback`, for what is quick: on the thread that brings the outcome."""
        with self._condition:
            if not self.done():
                self._followers.append(follow)
                return
        follow(self)

    def succeed(self, value: T) -> None:
        """Gives the outcome, unless there is one."""
        if self._may_end():
            self.set_result(value)

    def fail(self, error: BaseException) -> None:
        """Gives the error that is the outcome, unless there is one."""
        if self._may_end():
            self.set_exception(error)

    def _may_end(self) -> bool:
        return not self.done()

    def _invoke_callbacks(self) -> None:
        """The standard future calls it once there is an outcome. A user's callback that waited on
        this thread would wait for the thread that is to bring what it waits for.
        """
        callbacks, self._done_callbacks = self._done_callbacks, self._followers
        super()._invoke_callbacks()  # type: ignore[misc]
        self._done_callbacks = callbacks
        if callbacks:
            waiters.run_at_once(super()._invoke_callbacks)  # type: ignore[misc]


class CancellableFuture(APIFuture[T]):
    """The outcome of a call whose work stops when it is cancelled, also by cancelling its await."""

    def __init__(self) -> None:
        Future.__init__(self)  # pending, and so it can be cancelled, until the outcome is there
        self._prepare()

    async def _wait(self) -> None:
        try:
            await super()._wait()
        finally:
            if not self.done():
                self.cancel()  # whoever awaited has gone

    def _may_end(self) -> bool:
        return not self.done() and self.set_running_or_notify_cancel()


def _of_response(name: str) -> Any:
    def field(future: APIFuture[SampleResponse]) -> Any:
        return getattr(future.result(), name)

    return property(field, doc="As in `SampleResponse`.")


class SampleFuture(CancellableFuture[SampleResponse]):
    """A sample's outcome. Its response's fields are here too; reading one waits for the outcome."""

    sequences: list[SampledSequence] = _of_response("sequences")
    prompt_logprobs: list[float | None] | None = _of_response("prompt_logprobs")
    topk_prompt_logprobs: list[Topk | None] | None = _of_response("topk_prompt_logprobs")
    target_prompt_logprobs: TensorData | None = _of_response("target_prompt_logprobs")
    prompt_alt_tokens: PromptAltTokens | None = _of_response("prompt_alt_tokens")
    seed: int = _of_response("seed")
    prompt_cache_hit_tokens: int = _of_response("prompt_cache_hit_tokens")


def run_into(future: APIFuture[T], function: Callable[[], T]) -> None:
    """Gives a future what `function` returns or raises."""
    try:
        value = function()
    except BaseException as error:
        future.fail(error)
    else:
        future.succeed(value)


def on_thread(function: Callable[[], T]) -> APIFuture[T]:
    """Runs a function that blocks on a daemon thread that does nothing else meanwhile."""
    future: APIFuture[T] = APIFuture()
    waiters.run_at_once(lambda: run_into(future, function))
    return future


def _no_answer_within(timeout: float | None) -> APITimeoutError:
    return APITimeoutError(
        f"no answer within {timeout} s; the wait is over, the call is not: ask for the result again"
    )

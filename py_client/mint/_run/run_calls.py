"""The sequenced calls of one training run: their numbers, and what of them is on the wire."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from mint._run.runs import Opened, open_run
from mint._threads import sender
from mint._transport.call import Call, broken_off, check_size
from mint._transport.connection import Connection
from mint._transport.failures import Failure
from mint.futures import APIFuture

T = TypeVar("T")
MAX_IN_FLIGHT = 64  # where the server does not say


class RunCalls:
    """Sends a run's calls in program order, only so many unanswered at once. Thread-safe.

    A call gets its number when it goes on the wire. One may end without using its number up, when
    its key was refused or no server answered for too long. The run is then opened again before
    the next call is sent: that settles what the server has executed, and which number is next.
    """

    def __init__(
        self,
        connection: Connection,
        opened: Opened,
        max_in_flight: int,
    ) -> None:
        self.connection = connection
        self.training_run_id = opened.training_run.training_run_id
        self._process = os.getpid()
        self._max_in_flight = max_in_flight
        self._lock = threading.Lock()
        self._writer_epoch = opened.writer_epoch
        self._next_sequence = opened.next_sequence
        self._waiting: deque[SequencedCall] = deque()
        self._on_wire: dict[int, SequencedCall] = {}  # by number, of the present epoch
        self._answer_s = 0.0  # when the last answer came
        self._working_thread: int | None = None
        self._sending = False
        self._out_of_step = False
        self._opening = False
        self._fenced: Failure | None = None

    def submit(
        self,
        method: Any,
        request: Message,
        convert: Callable[[Any], T],
        explained: Callable[[Failure], Failure] | None = None,
    ) -> APIFuture[T]:
        """Queues a call behind those submitted before it. Refuses at once what is too large.
        `explained` adds to a failure what the caller alone knows.
        """
        check_size(self.connection, request, "data")
        call = SequencedCall(self, method, request, convert)
        call.explained = explained or call.explained
        future: APIFuture[T] = call.future
        self.enqueue([call])
        return future

    def enqueue(self, calls: "Sequence[SequencedCall]") -> None:
        """Queues calls, all or none, behind those queued before them. One that is held waits, and
        with it those behind it, until it is released or withdrawn.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "this TrainingClient belongs to the process from which this one was forked; take "
                f"the run over by ServiceClient.open_training_run({self.training_run_id!r})"
            )
        self.refuse_loss("call the run that it is computed for")
        with self._lock:
            self._waiting.extend(calls)
        sender.run(self._send_waiting)

    def release(self, held: "Sequence[SequencedCall]") -> None:
        """Has calls sent when it is their turn, as if they had been made now."""
        with self._lock:
            for call in held:
                call.held, call.made_s = False, time.monotonic()
        sender.run(self._send_waiting)

    def withdraw(self, held: "Sequence[SequencedCall]") -> None:
        """Takes calls out that will not be sent. Nobody hears of them any more."""
        with self._lock:
            self._waiting = deque(call for call in self._waiting if call not in held)
        sender.run(self._send_waiting)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Marks this thread as one that calls which are held are waiting for."""
        self._working_thread = threading.get_ident()
        try:
            yield
        finally:
            self._working_thread = None

    def refuse_loss(self, what: str) -> None:
        """Raises on the thread of a custom loss, for which calls that are held wait."""
        if self._working_thread == threading.get_ident():
            raise RuntimeError(
                f"a custom loss cannot {what}: that call would wait for the loss; do it before or "
                "after forward_backward_custom"
            )

    def _send_waiting(self) -> None:
        """Puts waiting calls on the wire while there is room.

        One thread at a time does it, so that calls leave in the order of their numbers, and not
        under the lock, since whatever a call's end sets off may come back here.
        """
        with self._lock:
            if self._sending:
                return
            self._sending = True
        try:
            while (step := self._next_step()) is not None:
                step()
        except BaseException as error:
            with self._lock:
                self._sending = False
            self._give_up_waiting(broken_off(self.connection, error))

    def _next_step(self) -> Callable[[], None] | None:
        with self._lock:
            full = len(self._on_wire) >= self._max_in_flight
            if self._opening or full or not self._waiting or self._waiting[0].held:
                self._sending = False
                return None
            if self._out_of_step:
                self._opening = True
                return self._begin_opening
            call = self._waiting.popleft()
            if self._fenced is not None:
                return partial(call.settle, self._fenced)
            call.request.sequence = call.sequence = self._next_sequence
            call.request.writer_epoch = self._writer_epoch
            self._on_wire[self._next_sequence] = call
            self._next_sequence += 1
            return partial(call.run_part, call.submit)

    def acknowledge(self, call: "SequencedCall") -> None:
        """Writes into the request of a call up to where all answers have been received."""
        with self._lock:
            if self._on_wire.get(call.sequence) is call:
                call.request.acknowledged_sequence = next(iter(self._on_wire)) - 1

    def lacks_an_earlier_one(self, call: "SequencedCall") -> bool:
        """Whether a call with a lower number is still on its way to the server."""
        with self._lock:
            known = self._on_wire.get(call.sequence) is call and not self._out_of_step
            return known and next(iter(self._on_wire)) < call.sequence

    def ended(self, call: "SequencedCall", outcome: Any) -> None:
        with self._lock:
            now_s = time.monotonic()
            call.seconds = now_s - max(call.made_s, self._answer_s)
            self._answer_s = now_s
            present = self._on_wire.get(call.sequence) is call
            if present:
                del self._on_wire[call.sequence]
            if present and isinstance(outcome, Failure) and not outcome.consumed:
                if outcome.reason == "WRITER_FENCED" and not self._opening:
                    self._fenced = outcome
                else:
                    self._out_of_step = True
        self._send_waiting()
        call.settle(outcome)
        del call.request, call.future  # or, in a cycle with the call, they would be kept for long

    def _begin_opening(self) -> None:
        open_run(self.connection, self.training_run_id, self._opened).submit()

    def _opened(self, outcome: Opened | Failure) -> None:
        if isinstance(outcome, Failure):
            self._give_up_waiting(outcome)
        else:
            with self._lock:
                # What was on the wire either ended or was dropped; its calls will hear so.
                self._opening = self._out_of_step = False
                self._on_wire = {}
                self._writer_epoch = outcome.writer_epoch
                self._next_sequence = outcome.next_sequence
        self._send_waiting()

    def _give_up_waiting(self, outcome: Failure) -> None:
        """Ends the calls that wait. The next one has the run opened again first."""
        with self._lock:
            self._opening, self._out_of_step = False, True
            lost, self._waiting = self._waiting, deque()
        for call in lost:
            call.settle(outcome)


class SequencedCall(Call[Any]):
    """One sequenced call: the same number in every attempt, the newest acknowledgement."""

    sequence = 0
    seconds = 0.0  # once it has its answer: since the run's answer before, or since it was made
    held = False  # whether it waits for what it is to carry

    def __init__(
        self, run: RunCalls, method: Any, request: Any, convert: Callable[[Any], Any]
    ) -> None:
        request.training_run_id = run.training_run_id
        super().__init__(run.connection, method, request, convert, ended=partial(run.ended, self))
        self._run = run
        self.future.check_wait = self._check_wait  # type: ignore[method-assign]
        self.made_s = time.monotonic()

    def before_attempt(self) -> None:
        self._run.acknowledge(self)

    def _check_wait(self) -> None:
        if not self.sequence:  # it has not been sent
            self._run.refuse_loss("wait for a call of its run that was made after it")

    def waits_for_another(self) -> bool:
        return self._run.lacks_an_earlier_one(self)

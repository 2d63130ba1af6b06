"""Forward and backward passes: a batch cut into messages, and their answers joined again."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, TypeVar

from mint import types
from mint._run.run_calls import RunCalls, SequencedCall
from mint._transport.failures import Failure
from mint.errors import APIResponseValidationError, InvalidInputError, MintError, refused
from mint.futures import APIFuture, run_into
from mint.types._checks import choice, instance, listed, mapping, number
from mintrpc.v1 import trainer_pb2

T = TypeVar("T")
U = TypeVar("U")
LogprobScope = Literal["all", "weighted"]
PassRequest = trainer_pb2.ForwardRequest | trainer_pb2.ForwardBackwardRequest
PassAnswer = trainer_pb2.ForwardResponse | trainer_pb2.ForwardBackwardResponse

_MAX_DATA = 1024  # of one message, where the server does not say
_ROOM_BYTES = 512  # for the ids and numbers that a request gets, and the run's id
_FRAME_BYTES = 8  # of a datum in its request
_REQUIRED_OPTIONS = ("beta",)  # of losses: those without a default
_INCOMPLETE = ("BACKWARD_COUNT_MISMATCH", "GRADIENT_INCOMPLETE")
_DATUM = re.compile(r"\bdata\[(\d+)\]")


class Passes:
    """Makes the calls of passes. Nothing is sent before all of a batch has been looked at."""

    def __init__(self, calls: RunCalls, max_data: int) -> None:
        self._connection = calls.connection
        self._calls = calls
        self._max_data = max_data or _MAX_DATA

    def requests(
        self,
        kind: type[PassRequest],
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        logprob_scope: str,
    ) -> list[PassRequest]:
        """The batch in as few messages as the server takes."""
        bare = kind()
        _set_loss(bare, loss_fn, loss_fn_config)
        remedy = "it must be 'all' or 'weighted'"
        enum = trainer_pb2.LogprobScope
        bare.logprob_scope = choice(enum, logprob_scope, "logprob_scope", remedy)
        return list(self._cut(bare, checked_batch(data)))

    def calls(
        self,
        requests: Sequence[PassRequest],
        loss_fn: str,
        convert: Callable[[list[types.ForwardBackwardOutput], float], T],
    ) -> tuple[list[SequencedCall], APIFuture[T]]:
        """The calls of a batch, not sent yet, and what `convert` makes of all their answers and the
        seconds that they took.
        """
        stub = self._connection.trainer
        calls, counts = [], [len(request.data) for request in requests]
        for request, count in zip(requests, counts, strict=True):
            backward = isinstance(request, trainer_pb2.ForwardBackwardRequest)
            method = stub.ForwardBackward if backward else stub.Forward
            read = partial(_output, count, loss_fn)
            calls.append(SequencedCall(self._calls, method, request, read))

        def whole(outputs: list[types.ForwardBackwardOutput]) -> T:
            return convert(outputs, sum(call.seconds for call in calls))

        firsts = accumulate(counts, initial=0)
        return calls, gathered([call.future for call in calls], list(firsts), whole)

    def submit(
        self, requests: Sequence[PassRequest], loss_fn: str
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Sends a batch; its answer comes as if it had been one message."""
        calls, joined = self.calls(requests, loss_fn, join)
        self._calls.enqueue(calls)
        return joined

    def _cut(self, bare: PassRequest, data: Sequence[types.Datum]) -> Iterator[PassRequest]:
        limit_bytes = self._connection.max_message_bytes - _ROOM_BYTES
        request = deepcopy(bare)
        size_bytes = 0
        for index, datum in enumerate(data):
            message = datum.to_proto()
            datum_bytes = message.ByteSize() + _FRAME_BYTES
            full = len(request.data) == self._max_data or size_bytes + datum_bytes > limit_bytes
            if request.data and full:
                yield request
                request, size_bytes = deepcopy(bare), 0
            if datum_bytes > limit_bytes:
                raise refused(
                    f"data[{index}]",
                    f"takes {datum_bytes} bytes, but the server takes "
                    f"{self._connection.max_message_bytes} in a message; shorten it",
                )
            request.data.add().CopyFrom(message)  # faster than to append it
            size_bytes += datum_bytes
        yield request


@dataclass(slots=True)
class _Gradient:
    """What a program asked for since the gradient was last cleared."""

    backwards: int = 0
    calls: int = 0
    lost: list[str] = field(default_factory=list)  # what failed, in words


class BackwardCount:
    """How many backwards a program asked for, whether or not they ever reached the server: what
    keeps a step from part of a batch. A call that raised at once, in front of the program, is none
    of them. Thread-safe.
    """

    def __init__(self, pending: int) -> None:
        self._gradient = _Gradient(pending)
        self._lock = threading.Lock()

    def add(self, count: int, outcome: APIFuture[Any]) -> None:
        """Counts the backwards of a call. If it fails, the step that is refused for it says so."""
        with self._lock:
            gradient = self._gradient
            gradient.backwards += count
            gradient.calls += 1
            number = gradient.calls

        def ended(call: Future[Any]) -> None:
            if (error := call.exception()) is not None:
                gradient.lost.append(f"call {number} of forward_backward failed ({error})")

        outcome.when_done(ended)

    def refused_behind_await(self, error: BaseException) -> None:
        """Counts a call that raised where perhaps nobody looks, such as in a gather."""
        lost: APIFuture[Any] = APIFuture()
        lost.fail(error)
        self.add(1, lost)

    def take(self) -> tuple[int, Callable[[Failure], Failure]]:
        """The count for an optimizer step, which clears the gradient also when it is refused, and
        what makes its refusal say which call was lost.
        """
        gradient = self._cleared()

        def explained(failure: Failure) -> Failure:
            if failure.reason not in _INCOMPLETE or not gradient.lost:
                return failure
            message = (
                f"{gradient.lost[0]}, so no step was taken and the gradient is cleared: mend that "
                "call and make all of the batch's again"
            )
            return replace(failure, message=message)

        return gradient.backwards, explained

    def clear(self) -> Callable[[Future[Any]], None]:
        """Clears the count for a call that clears the gradient if it succeeds.

        Returns what to call when it has ended: if it failed, and nothing else has cleared the
        count since, the backwards before it count again.
        """
        before, after = self._cleared(), self._gradient

        def ended(call: Future[Any]) -> None:
            if call.exception() is not None:
                with self._lock:
                    if self._gradient is after:
                        after.backwards += before.backwards
                        after.calls += before.calls
                        after.lost[:0] = before.lost

        return ended

    def _cleared(self) -> _Gradient:
        with self._lock:
            before, self._gradient = self._gradient, _Gradient()
            return before


def checked_batch(data: Iterable[types.Datum]) -> list[types.Datum]:
    """A batch of at least one datum."""
    batch = listed(data, "data", "types.Datum")
    if not batch:
        raise refused("data", "is empty; a batch needs at least one datum")
    for index, datum in enumerate(batch):
        instance(datum, types.Datum, f"data[{index}]", "give types.Datum")
    return batch


def _set_loss(
    request: PassRequest, loss_fn: str, loss_fn_config: Mapping[str, float] | None
) -> None:
    """Writes the loss into a request. Unknown names and options are refused."""
    losses = [field.name for field in request.DESCRIPTOR.oneofs_by_name["loss_fn"].fields]
    if not isinstance(loss_fn, str) or loss_fn not in losses:
        raise refused("loss_fn", f"is {loss_fn!r}; it must be one of {', '.join(losses)}")
    message, config = getattr(request, loss_fn), mapping(loss_fn_config, "loss_fn_config")
    options = [field.name for field in message.DESCRIPTOR.fields]
    for name in config:
        if name not in options:
            raise InvalidInputError(
                f"`loss_fn_config` has `{name}`, but {loss_fn} takes "
                f"{', '.join(options) or 'no options'}",
                field=f"loss_fn_config.{name}",
            )
    for name in options:
        if name in _REQUIRED_OPTIONS and name not in config:
            raise refused("loss_fn_config", f"lacks `{name}`, which {loss_fn} needs")
    message.SetInParent()
    for name, value in config.items():
        setattr(message, name, number(value, f"loss_fn_config.{name}"))


def join(
    outputs: Sequence[types.ForwardBackwardOutput], seconds: float
) -> types.ForwardBackwardOutput:
    """The answer to the whole batch, on which so many seconds were spent."""
    counts = [len(output.loss_fn_outputs) for output in outputs]
    metrics = merge_metrics([output.metrics for output in outputs], counts)
    tokens = metrics.get("tokens:sum")
    if tokens is not None and seconds > 0:
        metrics["tokens_per_second:mean"] = tokens / seconds
    return types.ForwardBackwardOutput(
        outputs[0].loss_fn_output_type,
        [entry for output in outputs for entry in output.loss_fn_outputs],
        metrics,
    )


def merge_metrics(parts: Sequence[Mapping[str, float]], counts: Sequence[int]) -> dict[str, float]:
    """Joins metrics as their suffixes say; means count by data. What not all parts have, or has a
    suffix that is not known, is left out.
    """
    if len(parts) == 1:
        return dict(parts[0])
    merged = {}
    for name in parts[0]:
        reduce = _REDUCTIONS.get(name.rpartition(":")[2])
        if reduce is not None and all(name in part for part in parts):
            merged[name] = reduce([part[name] for part in parts], counts)
    return merged


_REDUCTIONS: dict[str, Callable[[Sequence[float], Sequence[int]], float]] = {
    "sum": lambda values, counts: sum(values),
    "min": lambda values, counts: min(values),
    "max": lambda values, counts: max(values),
    "mean": lambda values, counts: (
        sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    ),
}


def gathered(
    futures: Sequence[APIFuture[T]], firsts: Sequence[int], convert: Callable[[list[T]], U]
) -> APIFuture[U]:
    """What `convert` makes of all results in order, once all calls have ended; or the error of the
    first that failed, with the indices of data as in the whole batch.
    """
    result: APIFuture[U] = APIFuture()
    left = len(futures)
    lock = threading.Lock()

    def ended(_: Any) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        for future, first in zip(futures, firsts, strict=False):
            if (error := future.exception()) is not None:
                result.fail(_moved(error, first))
                return
        run_into(result, lambda: convert([future.result() for future in futures]))

    result.check_wait = futures[-1].check_wait  # type: ignore[method-assign]
    for future in futures:
        future.when_done(ended)
    return result


def _output(num_data: int, loss_fn: str, answer: PassAnswer) -> types.ForwardBackwardOutput:
    if len(answer.outputs) != num_data:
        raise APIResponseValidationError(
            f"the answer has {len(answer.outputs)} outputs for {num_data} data"
        )
    return types.ForwardBackwardOutput.from_proto(answer, loss_fn)


def _moved(error: BaseException, first: int) -> BaseException:
    """The error with its data counted from the start of the batch."""

    def move(text: str) -> str:
        return _DATUM.sub(lambda match: f"data[{int(match[1]) + first}]", text)

    if first and isinstance(error, MintError):
        error.message, error.field = move(error.message), move(error.field)
        error.metadata = {name: move(value) for name, value in error.metadata.items()}
        error.args = (error.message,)
    return error

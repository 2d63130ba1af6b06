"""Forward and backward passes: a batch cut into messages, and their answers joined again."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from mint import types
from mint._run.losses import set_loss
from mint._run.run_calls import RunCalls, SequencedCall
from mint._transport.connection import Connection
from mint.errors import APIResponseValidationError, MintError, refused
from mint.futures import APIFuture, run_into
from mint.types._checks import instance
from mintrpc.v1 import trainer_pb2

T = TypeVar("T")
U = TypeVar("U")
LogprobScope = Literal["all", "weighted"]
PassRequest = trainer_pb2.ForwardRequest | trainer_pb2.ForwardBackwardRequest
PassAnswer = trainer_pb2.ForwardResponse | trainer_pb2.ForwardBackwardResponse

_SCOPES: dict[str, trainer_pb2.LogprobScope] = {
    "all": trainer_pb2.LOGPROB_SCOPE_ALL,
    "weighted": trainer_pb2.LOGPROB_SCOPE_WEIGHTED,
}
_MAX_DATA = 1024  # of one message, where the server does not say
_ROOM_BYTES = 512  # for the ids and numbers that a request gets, and the run's id
_FRAME_BYTES = 8  # of a datum in its request
_DATUM = re.compile(r"\bdata\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class BatchPart:
    """The answer to one message of a batch."""

    output: types.ForwardBackwardOutput
    seconds: float  # since the run's answer before it, or since it was sent


class Passes:
    """Makes the calls of passes. Nothing is sent before all of a batch has been looked at."""

    def __init__(self, connection: Connection, calls: RunCalls, max_data: int) -> None:
        self._connection = connection
        self._calls = calls
        self._max_data = max_data or _MAX_DATA

    def requests(
        self,
        bare: PassRequest,  # without data
        data: Sequence[types.Datum],
    ) -> list[PassRequest]:
        """The batch in as few messages as the server takes."""
        return list(self._cut(bare, checked_batch(data)))

    def calls(
        self, requests: Sequence[PassRequest], loss_fn: str
    ) -> tuple[list[SequencedCall], APIFuture[list[BatchPart]]]:
        """The calls of a batch, not sent yet, and the future of their answers, in order."""
        calls, futures, firsts = [], [], [0]
        for request in requests:
            backward = isinstance(request, trainer_pb2.ForwardBackwardRequest)
            stub = self._connection.trainer
            call, future = self._calls.make(
                stub.ForwardBackward if backward else stub.Forward,
                request,
                partial(_part, len(request.data), loss_fn),
            )
            calls.append(call)
            futures.append(future)
            firsts.append(firsts[-1] + len(request.data))
        return calls, gathered(futures, firsts)

    def submit(
        self, requests: Sequence[PassRequest], loss_fn: str
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Sends a batch; its answer comes as if it had been one message."""
        calls, parts = self.calls(requests, loss_fn)
        joined: APIFuture[types.ForwardBackwardOutput] = APIFuture()
        pass_on(parts, join, joined)
        self._calls.enqueue(*calls)
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
            request.data.append(message)
            size_bytes += datum_bytes
        yield request


def checked_batch(data: Sequence[types.Datum]) -> Sequence[types.Datum]:
    """A batch of at least one datum."""
    if isinstance(data, types.Datum) or len(data) == 0:
        raise refused("data", "is empty or not a list; a batch needs at least one datum")
    for index, datum in enumerate(data):
        instance(datum, types.Datum, f"data[{index}]", "give types.Datum")
    return data


def bare_request(
    kind: type[PassRequest],
    loss_fn: str,
    loss_fn_config: Mapping[str, float] | None,
    logprob_scope: str,
) -> PassRequest:
    """A request without data."""
    request = kind()
    set_loss(request, loss_fn, loss_fn_config)
    if logprob_scope not in _SCOPES:
        raise refused("logprob_scope", f"is {logprob_scope!r}; it must be 'all' or 'weighted'")
    request.logprob_scope = _SCOPES[logprob_scope]
    return request


def join(parts: Sequence[BatchPart], earlier_s: float = 0.0) -> types.ForwardBackwardOutput:
    """The answer to the whole batch, on which so many seconds had been spent before."""
    outputs = [part.output for part in parts]
    counts = [len(output.loss_fn_outputs) for output in outputs]
    metrics = merge_metrics([output.metrics for output in outputs], counts)
    tokens, seconds = metrics.get("tokens:sum"), sum((part.seconds for part in parts), earlier_s)
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


def gathered(futures: Sequence[APIFuture[T]], firsts: Sequence[int]) -> APIFuture[list[T]]:
    """All results in order, once all calls have ended; or the error of the first that failed, with
    the indices of data as in the whole batch.
    """
    result: APIFuture[list[T]] = APIFuture()
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
        result.succeed([future.result() for future in futures])

    for future in futures:
        future.add_done_callback(ended)
    return result


def pass_on(future: APIFuture[T], convert: Callable[[T], U], to: APIFuture[U]) -> None:
    """Gives `to` what `convert` makes of a result, or the error."""

    def ended(_: Any) -> None:
        if (error := future.exception()) is not None:
            to.fail(error)
        else:
            run_into(to, lambda: convert(future.result()))

    future.add_done_callback(ended)


def _part(num_data: int, loss_fn: str, answer: PassAnswer, seconds: float) -> BatchPart:
    if len(answer.outputs) != num_data:
        raise APIResponseValidationError(
            f"the answer has {len(answer.outputs)} outputs for {num_data} data"
        )
    return BatchPart(types.ForwardBackwardOutput.from_proto(answer, loss_fn), seconds)


def _moved(error: BaseException, first: int) -> BaseException:
    """The error with its data counted from the start of the batch."""

    def move(text: str) -> str:
        return _DATUM.sub(lambda match: f"data[{int(match[1]) + first}]", text)

    if first and isinstance(error, MintError):
        error.message, error.field = move(error.message), move(error.field)
        error.metadata = {name: move(value) for name, value in error.metadata.items()}
        error.args = (error.message,)
    return error

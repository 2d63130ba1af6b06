"""What users' own functions may do where this client calls them: wait for other calls."""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch

import mint
from mint import types
from mint.futures import APIFuture
from mintrpc.v1 import sampler_pb2
from tests.unit.mint.faulty_server import Code, Fault, Server

Data = list[types.Datum]
LIMIT_S = 20.0
PROMPT = types.ModelInput.from_ints([1, 2, 3])


def whole() -> sampler_pb2.StreamSampleResponse:
    """A stream's only message."""
    stop = sampler_pb2.STOP_REASON_STOP
    values = {"tokens": [5], "logprobs": [-1.0], "model_logprobs": [-1.0]}
    return sampler_pb2.StreamSampleResponse(**values, stop_reason=stop)


def sample(sampling: mint.SamplingClient) -> Any:
    return sampling.sample(PROMPT).result(LIMIT_S)


def exception(sampling: mint.SamplingClient) -> Any:
    assert sampling.sample(PROMPT).exception(LIMIT_S) is None
    return "none"


def score(sampling: mint.SamplingClient) -> Any:
    return sampling.compute_logprobs(PROMPT).result(LIMIT_S)


def read_field(sampling: mint.SamplingClient) -> Any:
    return sampling.sample(PROMPT).sequences


def read_stream(sampling: mint.SamplingClient) -> Any:
    return [part.tokens for part in sampling.sample_stream(PROMPT)]


def wait_on_a_loop(sampling: mint.SamplingClient) -> Any:
    return asyncio.run(sampling.sample_async(PROMPT))


@pytest.mark.parametrize(
    "wait", [sample, exception, score, read_field, read_stream, wait_on_a_loop]
)
@pytest.mark.parametrize("first", ["sample", "compute_logprobs"])
def test_a_callback_of_a_sample_may_wait_for_the_sampler(
    server: Server,
    sampling: mint.SamplingClient,
    first: str,
    wait: Callable[[mint.SamplingClient], Any],
) -> None:
    server.sampler.streams = [([whole()], None)]
    got: SimpleQueue[Any] = SimpleQueue()

    getattr(sampling, first)(PROMPT).add_done_callback(lambda _: got.put(wait(sampling)))

    assert got.get(timeout=LIMIT_S / 2)
    sampling.sample(PROMPT).result(LIMIT_S)


def test_more_callbacks_than_threads_may_wait_for_calls_of_their_run(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    got: SimpleQueue[Any] = SimpleQueue()
    gate = threading.Event()
    server.script.gates = dict.fromkeys(range(1, 13), gate)
    calls = [training.forward(data) for _ in range(12)]
    for call in calls:
        call.add_done_callback(lambda _: got.put(training.forward(data).result(LIMIT_S)))
    gate.set()

    for _ in calls:
        got.get(timeout=LIMIT_S / 2)


def test_a_callback_may_make_clients(
    service: mint.ServiceClient, training: mint.TrainingClient, data: Data
) -> None:
    got: SimpleQueue[Any] = SimpleQueue()
    for make in (
        service.create_lora_training_client,
        service.create_sampling_client,
        training.get_info,
        lambda: service.create_rest_client().list_training_runs,
    ):
        training.forward(data).add_done_callback(lambda _, make=make: got.put(make()))
        assert got.get(timeout=LIMIT_S / 2)


def test_a_callback_of_a_call_that_fails_where_calls_are_sent_may_wait(
    server: Server, training: mint.TrainingClient, sampling: mint.SamplingClient, data: Data
) -> None:
    server.script.faults = {(1, 1): Fault(Code.ABORTED, "WRITER_FENCED")}
    with pytest.raises(mint.ConflictError):
        training.forward(data).result(LIMIT_S)
    got: SimpleQueue[Any] = SimpleQueue()
    later = [training.forward(data) for _ in range(2)]

    later[0].add_done_callback(lambda _: got.put(later[1].exception(LIMIT_S)))

    assert isinstance(got.get(timeout=LIMIT_S / 2), mint.ConflictError)


def test_callbacks_keep_their_order_and_hold_up_no_outcome() -> None:
    first: APIFuture[int] = APIFuture()
    second: APIFuture[int] = APIFuture()
    got: SimpleQueue[Any] = SimpleQueue()
    first.add_done_callback(lambda ended: got.put(ended.result() + second.result(LIMIT_S)))
    first.add_done_callback(lambda _: 1 / 0)  # is logged, as that of a standard future
    first.add_done_callback(lambda _: got.put("after it"))

    first.succeed(1)
    second.succeed(2)

    assert [got.get(timeout=LIMIT_S / 2) for _ in range(2)] == [3, "after it"]


def total(data: Data, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return sum(array.sum() for array in logprobs), {}  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["later", "itself", "awaited"])
def test_a_custom_loss_that_waits_for_what_waits_for_it_is_refused(
    training: mint.TrainingClient, data: Data, kind: str
) -> None:
    made: SimpleQueue[APIFuture[Any]] = SimpleQueue()

    def loss(data: Data, logprobs: list[torch.Tensor]) -> Any:
        future = made.get(timeout=LIMIT_S)
        asyncio.run(future.coroutine()) if kind == "awaited" else future.result()
        return total(data, logprobs)

    custom = training.forward_backward_custom(data, loss)
    after = training.forward(data)
    made.put(custom if kind == "itself" else after)

    with pytest.raises(RuntimeError, match=r"cannot wait for a call .* before or after"):
        custom.result(LIMIT_S)
    after.result(LIMIT_S)


def test_a_custom_loss_may_wait_for_samples_and_for_calls_before_it(
    training: mint.TrainingClient, sampling: mint.SamplingClient, data: Data
) -> None:
    before = training.forward(data)

    def loss(data: Data, logprobs: list[torch.Tensor]) -> Any:
        before.result(LIMIT_S)
        sampling.sample(PROMPT).result(LIMIT_S)
        return total(data, logprobs)

    training.forward_backward_custom(data, loss).result(LIMIT_S)


def test_a_callback_of_a_custom_loss_that_fails_may_wait_for_a_call_after_it(
    training: mint.TrainingClient, data: Data
) -> None:
    got: SimpleQueue[Any] = SimpleQueue()
    custom = training.forward_backward_custom(data, lambda data, logprobs: 1 / 0)  # type: ignore[arg-type, return-value]
    custom.add_done_callback(lambda _: got.put(training.forward(data).result(LIMIT_S)))

    assert got.get(timeout=LIMIT_S / 2)

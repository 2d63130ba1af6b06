"""Samples as they come, through faults of the transport."""

import asyncio
import concurrent.futures
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import mint
from mint import types
from mintrpc.v1 import sampler_pb2
from tests.unit.mint.faulty_server import Code, Fault, Server

LIMIT_S = 20.0
PROMPT = types.ModelInput.from_ints([1, 2, 3])
STOP, LENGTH = sampler_pb2.STOP_REASON_STOP, sampler_pb2.STOP_REASON_LENGTH
BROKEN = Fault(Code.UNAVAILABLE)


def part(index: int, tokens: list[int], stop_reason: Any = None, seed: int = 0) -> Any:
    return sampler_pb2.StreamSampleResponse(
        index=index,
        tokens=tokens,
        logprobs=[-0.5 * token for token in tokens],
        model_logprobs=[-0.25 * token for token in tokens],
        stop_reason=stop_reason,
        seed=seed,
    )


def whole(parts: list[types.SamplePart]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for each in parts:
        tokens.setdefault(each.index, []).extend(each.tokens)
        assert each.logprobs == [-0.5 * token for token in each.tokens]
        assert each.model_logprobs == [-0.25 * token for token in each.tokens]
    return tokens


def test_parts_are_plain_values_in_their_order(
    server: Server, sampling: mint.SamplingClient
) -> None:
    server.sampler.streams = [
        ([part(1, [4]), part(0, [2, 6]), part(1, [], LENGTH), part(0, [8], STOP)], None)
    ]

    stream = sampling.sample_stream(PROMPT, 2, types.SamplingParams(max_tokens=3, seed=7))
    parts = list(stream)

    assert parts[1] == types.SamplePart(0, [2, 6], [-1.0, -3.0], [-0.5, -1.5])
    assert [(each.index, each.stop_reason) for each in parts] == [
        (1, None),
        (0, None),
        (1, "length"),
        (0, "stop"),
    ]
    assert stream.seed == 7
    (request,) = server.sampler.requests
    assert request.sample.num_samples == 2
    assert request.sample.sampling_params.max_tokens == 3


@pytest.mark.parametrize(
    "fault",
    [
        BROKEN,
        Fault(Code.INTERNAL, message="Received RST_STREAM with error code 2"),
        Fault(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=0.1),
    ],
)
def test_a_broken_stream_goes_on_without_a_repeated_token(
    server: Server, sampling: mint.SamplingClient, fault: Fault
) -> None:
    rest = [part(1, [7, 8]), part(0, [1]), part(2, [5]), part(2, [], STOP)]
    rest += [part(0, [2, 3, 4], LENGTH), part(1, [9], STOP)]
    server.sampler.streams = [
        ([part(0, [1, 2]), part(1, [7]), part(2, [5], STOP)], fault),
        ([part(2, [5], STOP), part(0, [1])], fault),
        (rest, None),
    ]

    parts = list(sampling.sample_stream(PROMPT, 3))

    assert whole(parts) == {0: [1, 2, 3, 4], 1: [7, 8, 9], 2: [5]}
    assert [each.stop_reason for each in parts if each.index == 2] == ["stop"]
    first, second, third = server.sampler.requests
    assert first == second == third
    assert first.sample.sampling_params.HasField("seed")


@pytest.fixture
def resuming(server: Server) -> Iterator[mint.SamplingClient]:
    """A client of a server whose streams go on."""
    server.model.features.append("resume_stream_sample")
    with mint.ServiceClient(base_url=server.address) as service:
        yield service.create_sampling_client()


def behind(offset: int, message: Any) -> Any:
    message.offset_tokens = offset
    return message


def test_a_broken_stream_asks_for_what_it_lacks(
    server: Server, resuming: mint.SamplingClient
) -> None:
    server.sampler.streams = [
        ([part(0, [1, 2]), part(1, [7], STOP)], BROKEN),
        ([behind(1, part(1, [], STOP)), behind(2, part(0, [3]))], BROKEN),
        ([behind(3, part(0, [4], LENGTH)), behind(1, part(1, [], STOP))], None),
    ]

    parts = list(resuming.sample_stream(PROMPT, 2))

    assert whole(parts) == {0: [1, 2, 3, 4], 1: [7]}
    assert [each.stop_reason for each in parts if each.index == 1] == ["stop"]
    first, second, third = server.sampler.requests
    assert first.sample == second.sample == third.sample
    assert not first.request_id  # who leaves it wants no more
    assert second.request_id == third.request_id != ""
    received = [[list(each.tokens) for each in request.received] for request in (second, third)]
    assert received == [[[1, 2], [7]], [[1, 2, 3], [7]]]


def test_a_token_that_is_missing_is_an_error(server: Server, resuming: mint.SamplingClient) -> None:
    server.sampler.streams = [([part(0, [1])], BROKEN), ([behind(2, part(0, [3], STOP))], None)]
    with pytest.raises(mint.APIResponseValidationError, match=r"token 2 .* where token 1 is next"):
        list(resuming.sample_stream(PROMPT))


def test_a_stream_that_cannot_go_on_is_an_error(
    server: Server, resuming: mint.SamplingClient
) -> None:
    refused = Fault(Code.FAILED_PRECONDITION, "TOKENS_DIFFER")
    server.sampler.streams = [([part(0, [1])], BROKEN), ([], refused)]
    with pytest.raises(mint.BadRequestError) as caught:
        list(resuming.sample_stream(PROMPT))
    assert caught.value.reason == "TOKENS_DIFFER"


@pytest.mark.parametrize("features", [[], ["resume_stream_sample"]])
def test_a_stream_of_the_newest_weights_goes_on_with_those_that_it_has(
    server: Server, features: list[str]
) -> None:
    server.model.features += features
    path, revision = "mint://r/sampler_weights/a", "mint://r/sampler_weights/a@3"
    messages = [part(0, [1]), part(0, [1, 2], STOP)]
    if features:
        messages[1] = behind(1, part(0, [2], STOP))
    for message in messages:
        message.revision_path = revision
    server.sampler.streams = [([messages[0]], BROKEN), ([messages[1]], None)]
    with mint.ServiceClient(base_url=server.address) as service:
        client = mint.SamplingClient(service._servers, path, "base")
        assert whole(list(client.sample_stream(PROMPT))) == {0: [1, 2]}
    assert [request.sample.model_path for request in server.sampler.requests] == [path, revision]


@pytest.mark.parametrize(
    "again",
    [
        [part(0, [1, 3])],  # another token
        [part(0, [1], STOP)],  # an earlier end
        [part(1, [7, 7])],  # a later end
        [part(1, [7], LENGTH)],  # another reason
    ],
)
def test_a_server_that_draws_other_tokens_is_an_error_and_the_end(
    server: Server, sampling: mint.SamplingClient, again: list[Any]
) -> None:
    server.sampler.streams = [([part(0, [1, 2]), part(1, [7], STOP)], BROKEN), (again, None)]
    stream = sampling.sample_stream(PROMPT, 2)
    assert [next(stream).tokens for _ in range(2)] == [[1, 2], [7]]

    with pytest.raises(mint.APIResponseValidationError, match="drew others"):
        next(stream)
    assert list(stream) == []


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([part(0, [1])], "ended before"),
        ([part(5, [1])], "continuation 5 of 2"),
        ([part(0, [1], seed=99)], "seed 99"),
        ([part(0, [1], 77)], "reason 77"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(
    server: Server, sampling: mint.SamplingClient, messages: list[Any], complaint: str
) -> None:
    server.sampler.streams = [(messages, None)]
    with pytest.raises(mint.APIResponseValidationError, match=complaint):
        list(sampling.sample_stream(PROMPT, 2, types.SamplingParams(seed=1)))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND"), mint.NotFoundError),
        (Fault(Code.INTERNAL, "ENGINE_FAULT"), mint.InternalServerError),
        (Fault(Code.RESOURCE_EXHAUSTED, "WAITED_TOO_LONG"), mint.RateLimitError),
        (Fault(Code.DEADLINE_EXCEEDED), mint.APITimeoutError),
    ],
)
def test_a_refusal_is_an_error_and_the_end(
    server: Server, sampling: mint.SamplingClient, fault: Fault, kind: type[Exception]
) -> None:
    server.sampler.streams = [([part(0, [1])], fault)]
    stream = sampling.sample_stream(PROMPT)
    assert next(stream).tokens == [1]
    with pytest.raises(kind):
        next(stream)
    assert list(stream) == []


def test_a_server_that_stays_away_is_an_error(server: Server) -> None:
    server.sampler.streams = [([part(0, [1])], BROKEN), *[([], BROKEN)] * 50]
    with mint.ServiceClient(base_url=server.address, timeout=0.5) as service:
        stream = service.create_sampling_client().sample_stream(PROMPT)
        assert next(stream).tokens == [1]
        with pytest.raises(mint.APIConnectionError, match="no server answered"):
            next(stream)


def test_a_bad_argument_is_refused_before_anything_is_sent(
    server: Server, sampling: mint.SamplingClient
) -> None:
    with pytest.raises(mint.BadRequestError, match="num_samples"):
        sampling.sample_stream(PROMPT, 0)
    with pytest.raises(mint.BadRequestError, match="prompt"):
        sampling.sample_stream([1, 2, 3])  # type: ignore[arg-type]
    assert not server.sampler.requests


def leave_by_break(stream: mint.SampleStream) -> None:
    for _ in stream:
        break


def leave_by_an_exception(stream: mint.SampleStream) -> None:
    def fail() -> None:
        for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def leave_the_context(stream: mint.SampleStream) -> None:
    with stream:
        next(stream)


def close_from_another_thread(stream: mint.SampleStream) -> None:
    threading.Timer(0.05, stream.close).start()
    assert len(list(stream)) == 1


def leave_an_async_loop(stream: mint.SampleStream) -> None:
    async def leave() -> None:
        async for _ in stream:
            break

    asyncio.run(leave())


def cancel_an_async_loop(stream: mint.SampleStream) -> None:
    async def run() -> None:
        async for _ in stream:
            pass

    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(run(), 0.1)

    asyncio.run(cancel())


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_an_exception,
        leave_the_context,
        close_from_another_thread,
        leave_an_async_loop,
        cancel_an_async_loop,
    ],
)
def test_leaving_a_stream_ends_its_rpc(
    server: Server, sampling: mint.SamplingClient, leave: Callable[[mint.SampleStream], None]
) -> None:
    stream = sampling.sample_stream(PROMPT)
    leave(stream)
    assert server.sampler.cancelled.wait(LIMIT_S)
    assert list(stream) == []


def test_a_stream_that_is_dropped_unread_ends_its_rpc(
    server: Server, sampling: mint.SamplingClient
) -> None:
    stream = sampling.sample_stream(PROMPT)
    assert server.sampler.started.wait(LIMIT_S)
    del stream
    assert server.sampler.cancelled.wait(LIMIT_S)


def test_a_closed_client_ends_its_streams(server: Server) -> None:
    service = mint.ServiceClient(base_url=server.address)
    sampling = service.create_sampling_client()
    stream = sampling.sample_stream(PROMPT)
    next(stream)
    service.close()
    with pytest.raises(mint.APIConnectionError, match="has been closed"):
        next(stream)
    with pytest.raises(mint.APIConnectionError, match="has been closed"):
        sampling.sample_stream(PROMPT)


async def test_it_can_be_awaited_and_a_wait_given_up_loses_nothing(
    server: Server, sampling: mint.SamplingClient
) -> None:
    server.sampler.streams = [
        ([part(0, [1])], BROKEN),
        ([part(0, [1, 2]), part(0, [3], STOP)], None),
    ]
    stream = sampling.sample_stream(PROMPT)
    parts = [await anext(stream)]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.0)
    parts += [each async for each in stream]

    assert whole(parts) == {0: [1, 2, 3]}


def test_streams_are_read_on_many_loops_and_threads(
    server: Server, sampling: mint.SamplingClient
) -> None:
    server.sampler.streams = [([part(0, [1]), part(0, [2], STOP)], None) for _ in range(24)]

    async def read_async() -> list[int]:
        return [token async for each in sampling.sample_stream(PROMPT) for token in each.tokens]

    async def read_together() -> list[list[int]]:
        return await asyncio.gather(*(read_async() for _ in range(4)))

    def read() -> list[int]:
        return [token for each in sampling.sample_stream(PROMPT) for token in each.tokens]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        apart = [pool.submit(read) for _ in range(8)]
        together = [pool.submit(asyncio.run, read_together()) for _ in range(4)]
        results = [each.result(LIMIT_S) for each in apart]
        results += [tokens for each in together for tokens in each.result(LIMIT_S)]
    assert results == [[1, 2]] * 24


ALONE = """
import signal, sys, mint
from mint import types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
stream = mint.ServiceClient(base_url=sys.argv[1]).create_sampling_client().sample_stream(
    types.ModelInput.from_ints([1])
)
print(next(stream).tokens, flush=True)
"""
WAITING = """
try:
    next(stream)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture
def alone(server: Server) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Starts a script in a process of its own, which has read the first part of a stream."""
    started: list[subprocess.Popen[str]] = []

    def start(rest: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", ALONE + rest, server.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "[1]\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_wait_is_interruptible(alone: Callable[[str], "subprocess.Popen[str]"]) -> None:
    import signal

    process = alone(WAITING)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=LIMIT_S)
    assert "interrupted" in output or "KeyboardInterrupt" in errors  # before or in the `try`


def test_a_stream_under_way_does_not_keep_the_process_alive(
    server: Server, alone: Callable[[str], "subprocess.Popen[str]"]
) -> None:
    output, errors = alone("").communicate(timeout=LIMIT_S)
    assert (output, errors) == ("", "")
    assert server.sampler.cancelled.wait(LIMIT_S)

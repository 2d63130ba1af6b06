"""What a sampler does when its engine dies and when its callers leave."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import mint
from mint import types
from mintrpc.v1 import sampler_pb2
from tests.samplers import DEADLINE_S, Sampler, connected, refusal, sample_request, tokens_of
from tests.servers import running_sampler

ENDLESS = {"max_tokens": 4000}  # of 1,000 samples: an hour of work
ENGINES_S = 4 * DEADLINE_S  # for calls that outlast up to three engines, on a busy machine
INPUT = types.ModelInput.from_ints([5, 6, 7])
LONG = types.SamplingParams(max_tokens=4000, seed=1, stop=[])
SHORT = types.SamplingParams(max_tokens=8, seed=1, stop=[])


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    """One that generates one continuation at a time: whoever comes later waits."""
    store = tmp_path_factory.mktemp("store")
    with (
        running_sampler(
            qwen3_folder, store, base_model_name="tiny", max_running_samples=1
        ) as service,
        connected(service, store) as sampler,
    ):
        yield sampler


@pytest.fixture
def client(sampler: Sampler) -> Iterator[mint.SamplingClient]:
    with mint.ServiceClient(base_url=sampler.service.address) as service:
        yield service.create_sampling_client()


def engine_of(sampler: Sampler) -> psutil.Process:
    (engine,) = sampler.engines()
    return engine


def endless_call(sampler: Sampler, **options: float) -> grpc.Future:
    """Starts a call and waits until its work has begun: a short one behind it cannot end."""
    call = sampler.stub.Sample.future(
        sample_request(num_samples=1000, params=ENDLESS), **{"timeout": 3600, **options}
    )
    with pytest.raises(grpc.RpcError) as caught:
        sampler.stub.Sample(sample_request(), timeout=1.0)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert not call.done() or "timeout" in options
    return call


def endless_stream(sampler: Sampler, **options: float) -> Any:
    """Starts a stream and waits until its work has begun."""
    request = sample_request(num_samples=1000, params=ENDLESS)
    call = sampler.stub.StreamSample(
        sampler_pb2.StreamSampleRequest(sample=request), **{"timeout": 3600, **options}
    )
    assert next(call).tokens
    return call


def answer(call: grpc.Future) -> object:
    """Waits for the end of a call."""
    return call.result()


Start = Callable[..., Any]
End = Callable[[Any], object]
either = pytest.mark.parametrize(
    ("start", "end"), [(endless_call, answer), (endless_stream, list)], ids=["whole", "stream"]
)


@either
def test_a_cancelled_call_stops_its_work(sampler: Sampler, start: Start, end: End) -> None:
    expected = tokens_of(sampler.sample())
    call = start(sampler)
    call.cancel()
    assert tokens_of(sampler.sample()) == expected


@either
def test_a_call_whose_deadline_passes_stops_its_work(
    sampler: Sampler, start: Start, end: Start
) -> None:
    call = start(sampler, timeout=2.0)
    assert tokens_of(sampler.sample())
    with pytest.raises(grpc.RpcError):
        end(call)
    assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED


@either
def test_a_caller_that_disappears_stops_its_work(
    sampler: Sampler, start: Start, end: Start
) -> None:
    with connected(sampler.service, Path("unused")) as other:
        call = start(other)
    assert call.code() == grpc.StatusCode.CANCELLED
    assert tokens_of(sampler.sample())


def test_leaving_the_clients_stream_stops_its_work(client: mint.SamplingClient) -> None:
    for part in client.sample_stream(INPUT, 1000, LONG):
        assert part.tokens
        break
    assert client.sample(INPUT, 1, SHORT).result(DEADLINE_S).sequences


def test_cancelling_a_sample_stops_its_work(client: mint.SamplingClient) -> None:
    running = client.sample(INPUT, 1000, LONG)
    with pytest.raises(mint.APITimeoutError):  # behind the other: it has begun
        client.sample(INPUT, 1, SHORT).result(1.0)
    assert running.cancel()
    assert client.sample(INPUT, 1, SHORT).result(DEADLINE_S).sequences


async def test_giving_up_the_await_of_a_sample_stops_its_work(client: mint.SamplingClient) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.sample(INPUT, 1000, LONG), 1.0)
    assert (await client.sample(INPUT, 1, SHORT).result_async(DEADLINE_S)).sequences

    task = asyncio.create_task(client.sample_async(INPUT, 1000, LONG))
    await asyncio.sleep(0)  # it is sent
    with pytest.raises(mint.APITimeoutError):
        await client.sample(INPUT, 1, SHORT).result_async(1.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await client.sample(INPUT, 1, SHORT).result_async(DEADLINE_S)).sequences


def kill_at_work(sampler: Sampler) -> None:
    """Kills the engine once it computes."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # nothing tells of an engine's work
        with contextlib.suppress(ValueError, psutil.NoSuchProcess):  # between two engines
            engine = engine_of(sampler)
            if f"engine ready pid={engine.pid} " not in sampler.service.log_text():
                continue
            started_s = engine.cpu_times().user
            while engine.cpu_times().user < started_s + 0.1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            engine.kill()
            engine.wait(DEADLINE_S)
            return


def test_calls_of_a_killed_engine_are_done_again_by_the_next(sampler: Sampler) -> None:
    path = sampler.publish("r-kill", seed=3)
    request = sample_request(model_path=path, params={"max_tokens": 1500})
    expected = sampler.stub.Sample(request, timeout=DEADLINE_S)
    call = sampler.stub.Sample.future(request, timeout=ENGINES_S)
    waiting = [sampler.stub.Sample.future(sample_request(), timeout=ENGINES_S) for _ in range(20)]

    kill_at_work(sampler)

    assert call.result().sequences == expected.sequences
    assert len({tuple(each.result().sequences[0].tokens) for each in waiting}) == 1


@pytest.mark.parametrize("how", [{}, {"regex": "(?:[a-z]{2} [0-9]+\\s){500}", "ignore_eos": False}])
def test_a_stream_goes_on_with_the_next_token_when_its_engine_is_killed(
    sampler: Sampler, how: dict[str, object]
) -> None:
    request = sample_request(params={"max_tokens": 1500, **how})
    (expected,) = tokens_of(sampler.stub.Sample(request, timeout=DEADLINE_S))
    stream = sampler.stub.StreamSample(
        sampler_pb2.StreamSampleRequest(sample=request), timeout=ENGINES_S
    )
    tokens = list(next(stream).tokens)

    engine_of(sampler).kill()

    for part in stream:
        tokens += part.tokens
    assert tokens == expected


# Each of the two starts three engines, and calls and streams are tried again by the same lines: one
# of them will do by default.
@pytest.mark.parametrize(
    ("start", "end"),
    [
        pytest.param(endless_call, answer, id="whole", marks=pytest.mark.slow),
        pytest.param(endless_stream, list, id="stream"),
    ],
)
def test_a_call_with_which_three_engines_die_fails_and_its_neighbours_do_not(
    sampler: Sampler, start: Start, end: End
) -> None:
    call = start(sampler)
    waiting = [sampler.stub.Sample.future(sample_request(), timeout=ENGINES_S) for _ in range(5)]
    for _ in range(3):
        kill_at_work(sampler)

    code, _, info = refusal(partial(end, call))

    assert code == grpc.StatusCode.INTERNAL
    assert info.reason == "ENGINE_FAULT"
    assert info.metadata["engine_deaths"] == "3"
    assert len({tuple(each.result().sequences[0].tokens) for each in waiting}) == 1


def test_calls_around_a_death_are_all_answered(sampler: Sampler) -> None:
    path = sampler.publish("r-again", seed=4)
    expected = sampler.sample(model_path=path)
    engine_of(sampler).kill()
    answers = [
        sampler.stub.Sample.future(sample_request(model_path=path), timeout=ENGINES_S)
        for _ in range(4)
    ]
    for answer in answers:  # sent before or after the front noticed
        assert answer.result().sequences == expected.sequences

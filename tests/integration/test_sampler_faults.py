"""What a sampler does when its engine dies and when its callers leave."""

import asyncio
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
    children = psutil.Process(sampler.service.process.pid).children()
    (engine,) = [c for c in children if "sampler_service.engine" in c.cmdline()]
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


@either
def test_a_killed_engine_fails_its_calls_and_the_next_one_serves(
    sampler: Sampler, start: Start, end: End
) -> None:
    path = sampler.publish("r-kill", seed=3)
    expected = sampler.sample(model_path=path)
    call = start(sampler)
    waiting = [sampler.stub.Sample.future(sample_request(), timeout=3600) for _ in range(20)]
    engine = engine_of(sampler)
    engine.kill()
    for fail in (partial(end, call), *(each.result for each in waiting)):
        code, _, info = refusal(fail)
        assert code == grpc.StatusCode.INTERNAL
        assert info.reason == "ENGINE_FAULT"
    # Waits for the new engine, to which the adapter is loaded again without a word.
    assert sampler.sample(model_path=path).sequences == expected.sequences
    assert engine_of(sampler).pid != engine.pid


def test_calls_around_a_death_end_one_way_or_the_other(sampler: Sampler) -> None:
    path = sampler.publish("r-again", seed=4)
    expected = sampler.sample(model_path=path)
    engine_of(sampler).kill()
    answers = [
        sampler.stub.Sample.future(sample_request(model_path=path), timeout=DEADLINE_S)
        for _ in range(4)
    ]
    for answer in answers:  # sent before or after the front noticed
        assert answer.exception() is not None or answer.result().sequences == expected.sequences
    assert sampler.sample(model_path=path).sequences == expected.sequences

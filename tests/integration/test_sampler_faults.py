"""What a sampler does when its engine dies and when its callers leave."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from tests.samplers import DEADLINE_S, Sampler, connected, refusal, sample_request, tokens_of
from tests.servers import running_sampler

ENDLESS = {"max_tokens": 4000}  # of 1,000 samples: an hour of work


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


def test_a_cancelled_call_stops_its_work(sampler: Sampler) -> None:
    expected = tokens_of(sampler.sample())
    call = endless_call(sampler)
    call.cancel()
    assert tokens_of(sampler.sample()) == expected


def test_a_call_whose_deadline_passes_stops_its_work(sampler: Sampler) -> None:
    call = endless_call(sampler, timeout=2.0)
    assert tokens_of(sampler.sample())
    assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_caller_that_disappears_stops_its_work(sampler: Sampler) -> None:
    with connected(sampler.service, Path("unused")) as other:
        call = endless_call(other)
    assert call.code() == grpc.StatusCode.CANCELLED
    assert tokens_of(sampler.sample())


def test_a_killed_engine_fails_its_calls_and_the_next_one_serves(sampler: Sampler) -> None:
    path = sampler.publish("r-kill", seed=3)
    expected = sampler.sample(model_path=path)
    call = endless_call(sampler)
    engine = engine_of(sampler)
    engine.kill()
    code, _, info = refusal(call.result)
    assert code == grpc.StatusCode.INTERNAL
    assert info.reason == "ENGINE_FAULT"
    # Waits for the new engine, to which the adapter is loaded again without a word.
    assert sampler.sample(model_path=path) == expected
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
        assert answer.exception() is not None or answer.result() == expected
    assert sampler.sample(model_path=path) == expected

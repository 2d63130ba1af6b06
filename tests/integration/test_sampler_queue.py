"""What a full sampler does, and what its callers see: raw ones, and clients that wait."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2

import mint
from mint import types
from mintrpc.v1 import sampler_pb2
from tests.keys import make_key
from tests.metrics import scrape, value
from tests.samplers import (
    DEADLINE_S,
    PROMPT,
    Sampler,
    connected,
    refusal,
    sample_request,
    tokens_of,
)
from tests.servers import running_sampler

ENDLESS = {"max_tokens": 4000}
QUEUE_SAMPLES = 1000
MANY = 2 * QUEUE_SAMPLES
MANY_LIMIT_S = 120.0
CALL_BYTES = 100_000  # of the front's memory, at most, for each call that waits


@pytest.fixture(scope="module")
def samplers(
    qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Sampler, Sampler]]:
    """One with a small waiting room, as two tenants see it."""
    store = tmp_path_factory.mktemp("store")
    keys = {tenant: make_key(tenant, store / "keys") for tenant in ("ann", "bob")}
    with (
        running_sampler(
            qwen3_folder, store, keys=store / "keys", queue_samples=QUEUE_SAMPLES
        ) as service,
        connected(service, store, keys["ann"]) as ann,
        connected(service, store, keys["bob"]) as bob,
    ):
        yield ann, bob


@pytest.fixture
def sampler(samplers: tuple[Sampler, Sampler]) -> Sampler:
    return samplers[0]


@pytest.fixture
def client(sampler: Sampler) -> Iterator[mint.SamplingClient]:
    key = sampler.metadata[0][1].removeprefix("Bearer ")
    with mint.ServiceClient(base_url=sampler.service.address, api_key=key) as service:
        yield service.create_sampling_client()


@contextmanager
def filled(sampler: Sampler) -> Iterator[grpc.Future]:
    """Fills the waiting room, for as long as the context lasts."""
    request = sample_request(num_samples=QUEUE_SAMPLES, params=ENDLESS)
    filler = sampler.stub.Sample.future(request, timeout=3600, metadata=sampler.metadata)
    try:
        while probe(sampler) is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            assert not filler.done()
        yield filler
    finally:
        filler.cancel()


def probe(sampler: Sampler) -> grpc.StatusCode:
    """How a short call ends that waits for a moment."""
    call = sampler.stub.Sample.future(sample_request(), timeout=0.2, metadata=sampler.metadata)
    code: grpc.StatusCode = call.code()
    return code


def queued(sampler: Sampler) -> float:
    return value(scrape(sampler.service.metrics_address), "mint_queue_samples")


def test_a_full_room_says_how_full_it_is_and_when_to_come_again(sampler: Sampler) -> None:
    with filled(sampler):
        for ask in (
            lambda: sampler.sample(),
            lambda: sampler.logprobs(PROMPT),
            lambda: list(
                sampler.stub.StreamSample(
                    sampler_pb2.StreamSampleRequest(sample=sample_request()),
                    timeout=DEADLINE_S,
                    metadata=sampler.metadata,
                )
            ),
        ):
            code, message, info = refusal(ask)
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert info.reason == "QUEUE_FULL"
            assert info.metadata["samples"] == info.metadata["max_samples"] == str(QUEUE_SAMPLES)
            assert "send it again in" in message
        assert queued(sampler) == QUEUE_SAMPLES


def test_the_client_waits_for_a_place_and_comes_again(
    sampler: Sampler, client: mint.SamplingClient
) -> None:
    params = types.SamplingParams(max_tokens=8, seed=1, stop=[])
    prompt = types.ModelInput.from_ints(list(PROMPT))
    with filled(sampler):
        refused = sampler.service.log_text().count("reason=QUEUE_FULL")
        waiting = [client.sample(prompt, 1, params) for _ in range(3)]
        scores = client.compute_logprobs(prompt)
        while sampler.service.log_text().count("reason=QUEUE_FULL") < refused + 8:
            assert not any(future.done() for future in waiting)  # each was refused, some again
            threading.Event().wait(0.02)
    answers = [future.result(DEADLINE_S) for future in waiting]

    expected = tokens_of(sampler.sample(params={"max_tokens": 8}))
    assert [answer.sequences[0].tokens for answer in answers] == expected * 3
    assert len(scores.result(DEADLINE_S)) == len(PROMPT)


def test_many_concurrent_calls_take_turns_and_cost_little(
    sampler: Sampler, client: mint.SamplingClient
) -> None:
    front, us = psutil.Process(sampler.service.process.pid), psutil.Process()
    prompt = types.ModelInput.from_ints(list(PROMPT))
    expected = client.sample(prompt, 1, types.SamplingParams(max_tokens=4, seed=0)).result()
    before = front.memory_info().rss, front.num_threads(), us.num_threads()
    futures = [
        client.sample(prompt, 1, types.SamplingParams(max_tokens=4, seed=seed))
        for seed in range(MANY)
    ]
    extra = front.num_threads() - before[1], us.num_threads() - before[2]
    answers = [future.result(MANY_LIMIT_S) for future in futures]

    assert [answer.seed for answer in answers] == list(range(MANY))
    assert answers[0].sequences == expected.sequences
    assert max(extra) <= 8
    assert front.memory_info().rss - before[0] < MANY * CALL_BYTES
    assert queued(sampler) == 0


def test_one_tenants_flood_leaves_room_for_another(samplers: tuple[Sampler, Sampler]) -> None:
    ann, bob = samplers
    with filled(ann):
        code, message, _ = refusal(lambda: ann.sample())
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "of yours" in message
        accepted = (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)
        assert probe(bob) in accepted  # though its turn may not come in time


@pytest.mark.parametrize("num_samples", [1, 50])
def test_a_call_that_ends_early_gives_its_places_back(sampler: Sampler, num_samples: int) -> None:
    request = sample_request(num_samples=num_samples, params=ENDLESS)
    call = sampler.stub.Sample.future(request, timeout=1.0, metadata=sampler.metadata)
    assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert tokens_of(sampler.sample())
    assert queued(sampler) == 0


def test_a_retry_hint_is_in_the_details(sampler: Sampler) -> None:
    from grpc_status import rpc_status

    with filled(sampler), pytest.raises(grpc.RpcError) as caught:
        sampler.sample()
    hints = [
        error_details_pb2.RetryInfo.FromString(detail.value)
        for detail in rpc_status.from_call(caught.value).details
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    ]
    (hint,) = hints
    assert 0.1 <= hint.retry_delay.ToTimedelta().total_seconds() <= 10.0

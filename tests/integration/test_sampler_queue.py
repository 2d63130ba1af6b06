"""What a full sampler does, and what its callers see: raw ones, and clients that wait."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2

import mint
from mint import types
from mint_core.access import make_key
from mintrpc.v1 import sampler_pb2
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
QUEUE_SAMPLES = 100
MANY = 2000
MANY_LIMIT_S = 120.0
CALL_BYTES = 100_000  # of the front's memory, at most, for each call that waits


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    """One with a small waiting room that generates one continuation at a time."""
    store = tmp_path_factory.mktemp("store")
    with (
        running_sampler(
            qwen3_folder,
            store,
            base_model_name="tiny",
            max_running_samples=1,
            queue_samples=QUEUE_SAMPLES,
        ) as service,
        connected(service, store) as sampler,
    ):
        yield sampler


@pytest.fixture
def client(sampler: Sampler) -> Iterator[mint.SamplingClient]:
    with mint.ServiceClient(base_url=sampler.service.address) as service:
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
                    sampler_pb2.StreamSampleRequest(sample=sample_request()), timeout=DEADLINE_S
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
    qwen3_folder: Path, tmp_path: Path
) -> None:
    with (
        running_sampler(
            qwen3_folder, tmp_path, base_model_name="tiny", queue_samples=MANY // 2
        ) as service,
        mint.ServiceClient(base_url=service.address) as mint_service,
    ):
        client = mint_service.create_sampling_client()
        front, us = psutil.Process(service.process.pid), psutil.Process()
        prompt = types.ModelInput.from_ints(list(PROMPT))
        expected = client.sample(prompt, 4, types.SamplingParams(max_tokens=4, seed=0)).result()
        before = front.memory_info().rss
        threads = front.num_threads(), us.num_threads()
        started_s = time.monotonic()
        futures = [
            client.sample(prompt, 1, types.SamplingParams(max_tokens=4, seed=seed))
            for seed in range(MANY)
        ]
        extra = front.num_threads() - threads[0], us.num_threads() - threads[1]
        answers = [future.result(MANY_LIMIT_S) for future in futures]
        assert time.monotonic() - started_s < MANY_LIMIT_S

        assert [answer.seed for answer in answers] == list(range(MANY))
        assert answers[0].sequences[0].tokens == expected.sequences[0].tokens
        assert max(extra) <= 8
        assert front.memory_info().rss - before < MANY * CALL_BYTES
        assert value(scrape(service.metrics_address), "mint_queue_samples") == 0


def test_one_tenants_flood_leaves_room_for_another(qwen3_folder: Path, tmp_path: Path) -> None:
    keys = {tenant: make_key(tenant, tmp_path / "keys") for tenant in ("ann", "bob")}
    store = tmp_path / "store"
    with (
        running_sampler(
            qwen3_folder, store, keys=tmp_path / "keys", queue_samples=QUEUE_SAMPLES
        ) as service,
        connected(service, store, keys["ann"]) as ann,
        connected(service, store, keys["bob"]) as bob,
        filled(ann),
    ):
        code, message, _ = refusal(lambda: ann.sample())
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "of yours" in message
        assert bob.stub.Sample.future(  # accepted, though its turn may not come in time
            sample_request(), timeout=2.0, metadata=bob.metadata
        ).code() in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.mark.parametrize("num_samples", [1, 50])
def test_a_call_that_ends_early_gives_its_places_back(sampler: Sampler, num_samples: int) -> None:
    request = sample_request(num_samples=num_samples, params=ENDLESS)
    call = sampler.stub.Sample.future(request, timeout=1.0)
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


def test_waiting_calls_of_a_client_go_on_at_the_next_server(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    flags = {"base_model_name": "tiny", "max_running_samples": 1}
    params = types.SamplingParams(max_tokens=8, seed=1, stop=[])
    prompt = types.ModelInput.from_ints(list(PROMPT))
    with running_sampler(qwen3_folder, tmp_path, **flags) as service:
        port = service.address
        with mint.ServiceClient(base_url=port) as mint_service:
            client = mint_service.create_sampling_client()
            expected = client.sample(prompt, 1, params).result(DEADLINE_S)
            endless = client.sample(prompt, 64, types.SamplingParams(max_tokens=4000, stop=[]))
            waiting = [client.sample(prompt, 1, params) for _ in range(20)]
            service.process.terminate()
            service.process.wait(DEADLINE_S)
            assert not any(future.done() for future in (endless, *waiting))
            with running_sampler(qwen3_folder, tmp_path, **flags, address=port):
                endless.cancel()
                answers = [future.result(DEADLINE_S) for future in waiting]
    assert answers == [expected] * 20

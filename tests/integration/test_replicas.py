"""A sampler with two engines: the same tokens from each, and from the other where one dies."""

import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mintrpc.v1 import model_pb2, model_pb2_grpc, sampler_pb2
from tests.metrics import Samples, scrape, value
from tests.samplers import DEADLINE_S, Sampler, connected, sample_request, tokens_of
from tests.servers import running_sampler

ENGINES_S = 4 * DEADLINE_S  # for calls that outlast an engine, on a busy machine
LONG = {"max_tokens": 500}
SOME = {"max_tokens": 150}


@pytest.fixture(scope="module")
def model(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that tests may spoil."""
    return Path(shutil.copytree(qwen3_folder, tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def sampler(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    store = tmp_path_factory.mktemp("store")
    with (
        running_sampler(model, store, base_model_name="tiny", replicas=2) as service,
        connected(service, store) as sampler,
    ):
        yield sampler


def replicas_up(sampler: Sampler) -> int:
    with grpc.insecure_channel(sampler.service.address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        said = stub.GetServerCapabilities(model_pb2.GetServerCapabilitiesRequest())
    assert said.replicas == 2
    assert said.engine_ready == (said.replicas_ready > 0)
    return int(said.replicas_ready)


def until_up(sampler: Sampler, count: int) -> None:
    deadline = time.monotonic() + ENGINES_S
    while replicas_up(sampler) != count:
        assert time.monotonic() < deadline
        time.sleep(0.02)  # nothing tells of it


def metrics(sampler: Sampler) -> Samples:
    return scrape(sampler.service.metrics_address)


def requests(samples: Samples, **labels: str) -> float:
    """How many were given to replicas under these labels."""
    return sum(
        number
        for (name, own), number in samples.items()
        if name == "mint_replica_requests" and labels.items() <= dict(own).items()
    )


def ask(sampler: Sampler, **fields: object) -> grpc.Future:
    request = sample_request(**fields)  # type: ignore[arg-type]
    return sampler.stub.Sample.future(request, timeout=ENGINES_S)


def begun_stream(sampler: Sampler, **fields: object) -> "tuple[grpc.Call, list[list[int]]]":
    """A stream and the tokens that have come of each continuation, of which there are some."""
    request = sampler_pb2.StreamSampleRequest(sample=sample_request(**fields))  # type: ignore[arg-type]
    stream = sampler.stub.StreamSample(request, timeout=ENGINES_S, metadata=sampler.metadata)
    tokens: list[list[int]] = [[] for _ in range(request.sample.num_samples or 1)]
    for _ in range(10):
        part = next(stream)
        tokens[part.index] += part.tokens
    return stream, tokens


def rest(stream: grpc.Call, tokens: list[list[int]]) -> list[list[int]]:
    for part in stream:
        tokens[part.index] += part.tokens
    return tokens


def test_each_replica_gives_the_same_tokens_and_logprobs(sampler: Sampler) -> None:
    path = sampler.publish("r-same", seed=1)
    fields = {"model_path": path, "num_samples": 2, "params": SOME}
    before = metrics(sampler)
    calls = [ask(sampler, **fields) for _ in range(8)]
    answers = [call.result().sequences for call in calls]
    assert all(each == answers[0] for each in answers)
    assert answers[0][0].tokens != answers[0][1].tokens
    after = metrics(sampler)
    for replica in "01":
        assert requests(after, replica=replica) > requests(before, replica=replica)
        assert value(after, "mint_replica_ready", replica=replica) == 1


def test_a_request_goes_where_its_prompt_and_adapter_are(sampler: Sampler) -> None:
    adapters = [sampler.publish(f"r-warm-{seed}", seed=seed) for seed in range(4)]
    for number, path in enumerate(adapters):
        sampler.sample(tuple(range(10, 200 + number)), model_path=path)
    before = metrics(sampler)
    for number, path in enumerate(adapters):
        sampler.sample((*range(10, 200 + number), 7), model_path=path)
    after = metrics(sampler)
    found = {"adapter": "there", "prompt": "kept"}
    assert requests(after, **found) - requests(before, **found) == len(adapters)
    cached = [value(each, "mint_tokens_total", kind="prompt_cached") for each in (before, after)]
    assert cached[1] - cached[0] >= 160 * len(adapters)


def test_an_adapter_that_many_want_is_soon_at_both(sampler: Sampler) -> None:
    path = sampler.publish("r-hot", seed=7)
    expected = sampler.sample(model_path=path, params=SOME)
    calls = [ask(sampler, model_path=path, params=SOME) for _ in range(12)]
    assert [call.result().sequences for call in calls] == [expected.sequences] * 12
    assert sampler.service.log_text().count(f"adapter loaded path={path}") == 2


def test_what_was_with_a_killed_replica_is_answered_by_the_other_meanwhile(
    sampler: Sampler,
) -> None:
    path = sampler.publish("r-kill", seed=3)
    asked = [
        {"model_path": path, "num_samples": 3, "params": {**LONG, "seed": seed}}
        for seed in range(4)
    ]
    expected = [tokens_of(ask(sampler, **each).result()) for each in asked]
    before = metrics(sampler)
    streams = [begun_stream(sampler, **each) for each in asked]
    calls = [ask(sampler, **each) for each in asked]
    while requests(metrics(sampler)) < requests(before) + 8:
        time.sleep(0.01)

    killed = sampler.engines()[0]
    others = set(sampler.engines()) - {killed}
    killed.kill()
    while not (starting := set(sampler.engines()) - others - {killed}):
        time.sleep(0.01)
    starting.pop().send_signal(signal.SIGSTOP)  # the other has to do it all

    assert [rest(*stream) for stream in streams] == expected
    assert [tokens_of(call.result()) for call in calls] == expected
    assert replicas_up(sampler) == 1
    with grpc.insecure_channel(sampler.service.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert check.status == health_pb2.HealthCheckResponse.SERVING
    for engine in sampler.engines():
        engine.send_signal(signal.SIGCONT)
    until_up(sampler, 2)


def test_a_replica_that_cannot_start_again_leaves_the_other_serving(
    sampler: Sampler, model: Path
) -> None:
    expected = sampler.sample()
    hidden = model.rename(model.with_name("hidden"))
    sampler.engines()[0].kill()
    with ThreadPoolExecutor() as pool:
        while "starting another in 0.2 s" not in sampler.service.log_text():  # a start failed
            answers = list(pool.map(lambda _: sampler.sample(), range(4)))
            assert [each.sequences for each in answers] == [expected.sequences] * 4
    assert replicas_up(sampler) == 1
    hidden.rename(model)
    until_up(sampler, 2)
    assert value(metrics(sampler), "mint_engine_ready") == 1


def test_a_death_of_all_is_waited_for(sampler: Sampler) -> None:
    path = sampler.publish("r-all", seed=5)
    expected = sampler.sample(model_path=path, params=SOME)
    calls = [ask(sampler, model_path=path, params=SOME) for _ in range(6)]
    for engine in sampler.engines():
        engine.kill()
    assert [call.result().sequences for call in calls] == [expected.sequences] * 6
    until_up(sampler, 2)

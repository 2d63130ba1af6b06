"""Samples as they come, over the contract and by the client, against real samplers."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest

import mint
from mint import types
from mintrpc.v1 import model_pb2, model_pb2_grpc, sampler_pb2, types_pb2
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
Parts = list[sampler_pb2.StreamSampleResponse]


@pytest.fixture(scope="module")
def sampler(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    store = tmp_path_factory.mktemp("store")
    with (
        running_sampler(qwen3_folder, store, base_model_name="tiny") as service,
        connected(service, store) as sampler,
    ):
        yield sampler


@pytest.fixture
def client(sampler: Sampler) -> Iterator[mint.SamplingClient]:
    with mint.ServiceClient(base_url=sampler.service.address) as service:
        yield service.create_sampling_client()


def stream(sampler: Sampler, timeout: float = DEADLINE_S, **fields: object) -> grpc.Call:
    request = sampler_pb2.StreamSampleRequest(sample=sample_request(**fields))  # type: ignore[arg-type]
    return sampler.stub.StreamSample(request, timeout=timeout, metadata=sampler.metadata)


def joined(parts: Parts, index: int) -> sampler_pb2.SampledSequence:
    own = [part for part in parts if part.index == index]
    assert all(part.stop_reason == sampler_pb2.STOP_REASON_UNSPECIFIED for part in own[:-1])
    return sampler_pb2.SampledSequence(
        tokens=[token for part in own for token in part.tokens],
        logprobs=[logprob for part in own for logprob in part.logprobs],
        model_logprobs=[logprob for part in own for logprob in part.model_logprobs],
        stop_reason=own[-1].stop_reason,
        revision_path=own[-1].revision_path,
    )


def test_a_stream_holds_what_sample_gives_whole(sampler: Sampler) -> None:
    path = sampler.publish("r-stream", seed=1)
    params = {"max_tokens": 24, "temperature": 0.8, "ignore_eos": False, "seed": 5}
    fields = {"model_path": path, "num_samples": 6, "params": params}
    whole = sampler.sample(**fields)  # type: ignore[arg-type]

    parts = list(stream(sampler, **fields))

    assert [joined(parts, index) for index in range(6)] == list(whole.sequences)
    assert {(part.seed, part.revision_path) for part in parts} == {(5, path)}
    assert all(len(part.tokens) == len(part.logprobs) for part in parts)


def test_samples_of_a_stream_come_side_by_side(sampler: Sampler) -> None:
    parts = list(stream(sampler, num_samples=4, params={"max_tokens": 64}))
    first = {index: [p.index for p in parts].index(index) for index in range(4)}
    last = [part.index for part in parts if part.stop_reason]
    assert sorted(last) == [0, 1, 2, 3]
    assert max(first.values()) < len(parts) - 4
    assert len(parts) > 16


def test_prompt_logprobs_are_refused_by_name(sampler: Sampler) -> None:
    code, message, info = refusal(lambda: list(stream(sampler, include_prompt_logprobs=True)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "`include_prompt_logprobs`" in message
    assert info.metadata["field"] == "include_prompt_logprobs"


def test_a_stream_leaves_a_log_line_and_metrics(sampler: Sampler) -> None:
    def first_tokens() -> float:
        return value(scrape(sampler.service.metrics_address), "mint_first_token_seconds_count")

    before = first_tokens()
    list(stream(sampler, num_samples=2, params={"max_tokens": 7, "seed": 77}))
    lines = [line for line in sampler.service.log_text().splitlines() if "=StreamSample" in line]
    for word in ("code=OK", "prompt_tokens=8", "samples=2", "tokens=14", "first_token_s=", "run_s"):
        assert word in lines[-1]
    assert first_tokens() == before + 1


def test_a_slow_reader_holds_nobody_up_and_gets_all(sampler: Sampler) -> None:
    # About 1 MB in single tokens, which is more than the connection takes in ahead of the reader.
    slow = stream(sampler, num_samples=63, params={"max_tokens": 300})
    parts = [next(slow)]
    for seed in range(3):
        assert tokens_of(sampler.sample(params={"seed": seed}))
    sampler.sample(params={"max_tokens": 400})  # longer than the slow reader's
    parts += list(slow)

    assert [len(joined(parts, index).tokens) for index in range(63)] == [300] * 63
    assert len(parts) < 63 * 300  # joined while nobody read


def test_slow_readers_that_disappear_are_callers_that_left(sampler: Sampler) -> None:
    before, count = len(sampler.service.log_text()), 8
    readers = subprocess.Popen(
        [sys.executable, "-m", "tests.slow_readers", sampler.service.address, str(count)],
        stdout=subprocess.PIPE,
    )
    with readers:
        assert readers.stdout is not None
        assert readers.stdout.readline() == b"begun\n"
        sampler.sample(params={"max_tokens": 400})  # longer than theirs, whose next writes wait
        readers.kill()
    deadline, log = time.monotonic() + DEADLINE_S, ""
    while log.count("=StreamSample") < count:
        assert time.monotonic() < deadline
        log = sampler.service.log_text()[before:]
    assert log.count("method=StreamSample tenant=default code=CANCELLED") == count
    assert "Traceback" not in log


def test_who_waits_for_too_long_is_told_for_how_long_and_why(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    limits = {"max_running_samples": 1, "max_adapters": 1, "max_wait_s": 1.5}
    with (
        running_sampler(qwen3_folder, tmp_path, base_model_name="tiny", **limits) as service,
        connected(service, tmp_path) as sampler,
    ):
        paths = [sampler.publish(f"r-wait-{seed}", seed=seed) for seed in range(2)]
        running = stream(sampler, model_path=paths[0], num_samples=1000, params=ENDLESS)
        next(running)
        asked = [  # one path waits for its turn, the other for the adapter's place
            partial(ask, sampler, model_path=path)
            for path in paths
            for ask in (stream, Sampler.sample)
        ]
        with ThreadPoolExecutor(len(asked)) as pool:
            refusals = pool.map(lambda ask: refusal(lambda: list(ask())), asked)
        for code, message, info in refusals:
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert info.reason == "WAITED_TOO_LONG"
            assert 1.4 < float(info.metadata["waited_s"]) < 10
            assert "--max-wait-s" in message
        running.cancel()
        assert tokens_of(sampler.sample(model_path=paths[1]))


# By the client.

INPUT = types.ModelInput.from_ints(list(PROMPT))
SHORT = types.SamplingParams(max_tokens=8, seed=1, stop=[])
LONG = types.SamplingParams(max_tokens=600, seed=1, stop=[])


def whole(parts: list[types.SamplePart]) -> list[int]:
    return [token for part in parts for token in part.tokens]


async def test_the_clients_stream_holds_what_its_sample_gives(client: mint.SamplingClient) -> None:
    expected = client.sample(INPUT, 1, SHORT).result(DEADLINE_S).sequences[0]
    parts = list(client.sample_stream(INPUT, 1, SHORT))
    again = [part async for part in client.sample_stream(INPUT, 1, SHORT)]

    for each in (parts, again):
        assert whole(each) == expected.tokens
        assert [lp for part in each for lp in part.logprobs] == expected.logprobs
        assert [lp for part in each for lp in part.model_logprobs] == expected.model_logprobs
        assert each[-1].stop_reason == expected.stop_reason == "length"


def test_calls_and_streams_of_a_client_go_on_at_the_next_server(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    flags = {"base_model_name": "tiny", "max_running_samples": 2}
    with (
        running_sampler(qwen3_folder, tmp_path, **flags) as service,
        mint.ServiceClient(base_url=service.address) as mint_service,
    ):
        client = mint_service.create_sampling_client()
        expected = client.sample(INPUT, 2, LONG).result(DEADLINE_S).sequences
        stream = client.sample_stream(INPUT, 2, LONG)
        parts = [next(stream) for _ in range(10)]
        waiting = [client.sample(INPUT, 1, SHORT) for _ in range(20)]
        service.process.kill()
        service.process.wait()
        with running_sampler(qwen3_folder, tmp_path, **flags, address=service.address):
            parts += list(stream)
            answers = [future.result(DEADLINE_S) for future in waiting]

    for index in range(2):
        own = [part for part in parts if part.index == index]
        assert whole(own) == expected[index].tokens
        assert [part.stop_reason for part in own[-2:]] == [None, "length"]
    assert {answer.sequences[0].tokens == expected[0].tokens[:8] for answer in answers} == {True}


def text_chunk(text: str) -> types_pb2.ModelInput:
    return types_pb2.ModelInput(chunks=[{"text": {"text": text}}])


@pytest.mark.parametrize("seed", range(3))
def test_text_comes_with_tokens_in_whole_characters(sampler: Sampler, seed: int) -> None:
    params = {"seed": seed, "max_tokens": 24, "temperature": 2.0}
    whole = sampler.sample(params=params, num_samples=3, include_text=True)
    texts, tokens = [""] * 3, [list[int]() for _ in range(3)]
    for part in stream(sampler, params=params, num_samples=3, include_text=True):
        assert part.stop_reason or not part.text.endswith("\ufffd")
        texts[part.index] += part.text
        tokens[part.index] += part.tokens

    with grpc.insecure_channel(sampler.service.address) as channel:
        request = model_pb2.DetokenizeRequest(sequences=[{"tokens": each} for each in tokens])
        decoded = list(model_pb2_grpc.ModelServiceStub(channel).Detokenize(request).texts)
    assert [sequence.text for sequence in whole.sequences] == decoded
    assert texts == decoded
    assert not [part.text for part in stream(sampler, params=params) if part.text]  # nobody asked


def test_a_prompt_of_text_is_one_of_its_tokens(sampler: Sampler) -> None:
    text = "one two three"
    with grpc.insecure_channel(sampler.service.address) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel)
        tokens = models.Tokenize(model_pb2.TokenizeRequest(texts=[text])).sequences[0].tokens
    given = sample_request(tuple(tokens), include_prompt_logprobs=True)
    expected = sampler.stub.Sample(given, timeout=DEADLINE_S)
    given.prompt.CopyFrom(text_chunk(text))
    answer = sampler.stub.Sample(given, timeout=DEADLINE_S)
    assert tokens_of(answer) == tokens_of(expected)
    assert list(answer.prompt_logprobs)[1:] == list(expected.prompt_logprobs)[1:]
    assert stream_of(sampler, text) == tokens_of(expected)[0]
    compute = sampler_pb2.ComputeLogprobsRequest(prompt=text_chunk(text))
    assert list(sampler.stub.ComputeLogprobs(compute).logprobs)[1:] == pytest.approx(
        list(expected.prompt_logprobs)[1:]
    )


def stream_of(sampler: Sampler, text: str) -> list[int]:
    asked = sample_request()
    asked.prompt.CopyFrom(text_chunk(text))
    request = sampler_pb2.StreamSampleRequest(sample=asked)
    return [
        t for part in sampler.stub.StreamSample(request, timeout=DEADLINE_S) for t in part.tokens
    ]


def test_texts_that_make_no_prompt_are_refused(sampler: Sampler) -> None:
    for texts, why in (([""], "prompt"), (["a" * 3_000_000] * 2, "split it")):
        asked = sample_request()
        asked.prompt.CopyFrom(types_pb2.ModelInput(chunks=[{"text": {"text": t}} for t in texts]))
        code, message, _ = refusal(lambda asked=asked: sampler.stub.Sample(asked))  # type: ignore[misc]
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert why in message

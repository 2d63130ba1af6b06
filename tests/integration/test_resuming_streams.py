"""Streams that are cut go on: by the contract and by the client, with real services and proxies."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

import mint
from mint import types
from mint_core.rpc.caller import CALLER, Caller
from mint_core.rpc.metrics import Metrics
from mintrpc.v1 import sampler_pb2
from sampler_service import streams
from sampler_service.config import SamplerConfig
from sampler_service.requests import parse_stream_sample
from sampler_service.service import SamplerService
from tests.harness.proxy import Proxy
from tests.keys import make_key
from tests.languages.proxy import SwallowingProxy
from tests.metrics import scrape, value
from tests.samplers import DEADLINE_S, PROMPT, Sampler, connected, refusal, sample_request
from tests.servers import RunningService, running_sampler

INPUT = types.ModelInput.from_ints(list(PROMPT))
PARAMS = types.SamplingParams(max_tokens=200, seed=3, temperature=0.8, stop=[])
Code = grpc.StatusCode
Drawn = list[tuple[list[int], list[float], list[float], Any]]  # of each continuation


@dataclass(frozen=True, slots=True)
class Keyed:
    service: RunningService
    store: Path
    keys: dict[str, str]  # by tenant


@pytest.fixture(scope="module")
def keyed(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("resuming")
    keys = {tenant: make_key(tenant, folder / "keys") for tenant in ("ann", "bob")}
    flags = {"keys": folder / "keys", "base_model_name": "tiny"}
    with running_sampler(qwen3_folder, folder / "store", **flags) as service:
        yield Keyed(service, folder / "store", keys)


@pytest.fixture
def sampler(keyed: Keyed) -> Iterator[Sampler]:
    with connected(keyed.service, keyed.store, keyed.keys["ann"]) as ann:
        yield ann


@pytest.fixture
def bob(keyed: Keyed) -> Iterator[Sampler]:
    with connected(keyed.service, keyed.store, keyed.keys["bob"]) as other:
        yield other


def request(**fields: Any) -> sampler_pb2.StreamSampleRequest:
    resuming = {name: fields.pop(name) for name in ("request_id", "received") if name in fields}
    return sampler_pb2.StreamSampleRequest(sample=sample_request(**fields), **resuming)


def stream(sampler: Sampler, **fields: Any) -> Any:
    return sampler.stub.StreamSample(
        request(**fields), timeout=DEADLINE_S, metadata=sampler.metadata
    )


def joined(parts: list[Any], count: int) -> Drawn:
    """Tokens and logprobs of each continuation, whose places have no gap."""
    drawn: list[Any] = [([], [], [], None) for _ in range(count)]
    for part in parts:
        tokens, logprobs, model_logprobs, _ = drawn[part.index]
        assert part.offset_tokens == len(tokens)
        tokens += part.tokens
        logprobs += part.logprobs
        model_logprobs += part.model_logprobs
        drawn[part.index] = (tokens, logprobs, model_logprobs, part.stop_reason or None)
    return drawn


def received(parts: list[Any], count: int) -> list[dict[str, list[int]]]:
    return [{"tokens": tokens} for tokens, *_ in joined(parts, count)]


def held(sampler: Sampler) -> float:
    """Continuations that the sampler still works on, or holds."""
    return value(scrape(sampler.service.metrics_address), "mint_queue_samples")


def until_held(sampler: Sampler, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while held(sampler) != count:
        assert time.monotonic() < deadline


ASKED: dict[str, Any] = {"num_samples": 3, "params": {"max_tokens": 120, "temperature": 0.8}}


@pytest.mark.parametrize("request_id", ["", "one"])
def test_a_stream_that_is_cut_anywhere_is_the_unbroken_one(
    sampler: Sampler, request_id: str
) -> None:
    whole = joined(list(stream(sampler, **ASKED)), 3)
    parts: list[Any] = []
    for count in (1, 7, 40):
        cut = stream(sampler, **ASKED, request_id=request_id, received=received(parts, 3))
        parts += [next(cut) for _ in range(count)]
        cut.cancel()
        if request_id:
            until_held(sampler, 3)
    parts += stream(sampler, **ASKED, request_id=request_id, received=received(parts, 3))
    assert joined(parts, 3) == whole
    until_held(sampler, 0)

    again = list(stream(sampler, **ASKED, received=received(parts, 3)))
    assert sorted(part.index for part in again) == [0, 1, 2]
    assert all(part.stop_reason and not part.tokens for part in again)


def test_what_was_lost_on_the_way_is_held(sampler: Sampler) -> None:
    """Whatever a reader says that it has: more has been written to it."""
    asked = {"params": {"max_tokens": 1000}}
    whole = joined(list(stream(sampler, **asked)), 1)
    first = stream(sampler, **asked, request_id="lossy")
    parts = [next(first) for _ in range(30)]
    rest = stream(sampler, **asked, request_id="lossy", received=received(parts[:5], 1))
    assert joined(parts[:5] + list(rest), 1) == whole
    code, message, _ = refusal(lambda: list(first))
    assert code == Code.ABORTED
    assert "another call goes on with this stream" in message


def test_text_goes_on_in_whole_characters(sampler: Sampler) -> None:
    within = 0  # a character, at the end of a part
    for seed in range(3):
        params = {"max_tokens": 16, "temperature": 2.0, "seed": seed}
        asked: dict[str, Any] = {"params": params, "include_text": True}
        parts = list(stream(sampler, **asked))
        text = "".join(part.text for part in parts)
        within += any(not part.text for part in parts)
        for count in range(1, len(parts)):
            begun = parts[:count]
            rest = stream(sampler, **asked, received=received(begun, 1))
            assert "".join(part.text for part in (*begun, *rest)) == text
    assert within


def test_other_tokens_are_refused_by_name(sampler: Sampler) -> None:
    parts = list(stream(sampler, params={"max_tokens": 8}))
    tokens = [token for part in parts for token in part.tokens]
    tokens[5] ^= 1
    wrong = stream(sampler, params={"max_tokens": 8}, received=[{"tokens": tokens}])
    code, message, info = refusal(lambda: list(wrong))
    assert (code, info.reason) == (Code.FAILED_PRECONDITION, "TOKENS_DIFFER")
    assert dict(info.metadata) == {"index": "0", "position": "5"}
    assert "sample again" in message


def test_a_revision_that_is_gone_is_refused_by_name(sampler: Sampler) -> None:
    path = "mint://r-gone/sampler_weights/a@1"
    gone = stream(sampler, model_path=path, received=[{"tokens": [1]}])
    code, _, info = refusal(lambda: list(gone))
    assert (code, info.reason) == (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND")


def test_a_stranger_cannot_go_on_with_a_stream(sampler: Sampler, bob: Sampler) -> None:
    path = sampler.publish("r-ann", seed=1, tenant="ann")
    own = {"model_path": path, "params": {"max_tokens": 600}, "request_id": "shared"}
    anns = stream(sampler, **own)
    parts = [next(anns) for _ in range(3)]
    anns.cancel()
    until_held(sampler, 1)

    code, _, info = refusal(lambda: list(stream(bob, **own, received=received(parts, 1))))
    assert (code, info.reason) == (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
    bobs = stream(bob, params={"max_tokens": 600}, request_id="shared")
    next(bobs)  # of the base model, beside ann's
    assert held(sampler) == 2
    rest = list(stream(sampler, **own, received=received(parts, 1)))
    assert joined(parts + rest, 1) == joined(list(stream(sampler, **own)), 1)
    list(bobs)


@contextmanager
def through(proxy: Proxy, key: str) -> Iterator[mint.SamplingClient]:
    with (
        closing(proxy),
        mint.ServiceClient(base_url=proxy.address, api_key=key) as service,
    ):
        yield service.create_sampling_client()


def plain(parts: list[types.SamplePart]) -> list[Any]:
    return [
        [
            [x for part in parts if part.index == index for x in getattr(part, name)]
            for name in ("tokens", "logprobs", "model_logprobs")
        ]
        for index in range(2)
    ]


CUTS: dict[str, Callable[[str], Proxy]] = {
    "cut": Proxy,
    "swallowed": lambda target: SwallowingProxy(target, lambda call: call in (2, 3)),
}


@pytest.mark.parametrize("kind", CUTS)
def test_the_clients_stream_through_a_bad_network_is_the_unbroken_one(
    sampler: Sampler, keyed: Keyed, kind: str
) -> None:
    key = keyed.keys["ann"]
    with mint.ServiceClient(base_url=sampler.service.address, api_key=key) as service:
        whole = list(service.create_sampling_client().sample_stream(INPUT, 2, PARAMS))
    proxy = CUTS[kind](sampler.service.address)
    with through(proxy, key) as client:
        parts: list[types.SamplePart] = []
        for part in client.sample_stream(INPUT, 2, PARAMS):
            parts.append(part)
            if kind == "cut" and len(parts) in (1, 20, 21, 150):
                proxy.cut()
    assert plain(parts) == plain(whole)
    assert sorted(part.index for part in parts if part.stop_reason) == [0, 1]
    until_held(sampler, 0)


def test_the_clients_watch_through_a_bad_network_tells_each_event_once(
    trainer: RunningService,
) -> None:
    proxy = Proxy(trainer.address)
    with (
        closing(proxy),
        mint.ServiceClient(base_url=trainer.address) as direct,
        mint.ServiceClient(base_url=proxy.address) as proxied,
    ):
        run = direct.create_lora_training_client(rank=4)
        events: list[types.RunEvent] = []
        with proxied.watch_training_run(run.training_run_id) as watch:
            while not (events and events[-1].queue_progress):
                events.append(next(watch))
            for count in range(1, 6):
                proxy.cut()
                direct.update_training_run(run.training_run_id, {"count": str(count)})
                for _ in range(count):
                    run.discard_gradient().result(DEADLINE_S)
                last = sum(range(count + 1))
                while not (events[-1].call_outcome and events[-1].call_outcome.sequence == last):
                    events.append(next(watch))
    ends = [event.call_outcome for event in events if event.call_outcome]
    assert [end.sequence for end in ends] == list(range(1, 16))
    assert not any(end.missed_outcomes for end in ends)
    states = [str(event.training_run.metadata) for event in events if event.training_run]
    assert states[0] == "{}"
    assert states == list(dict.fromkeys(states))  # none of them twice


async def test_what_nobody_comes_back_for_ends(
    qwen3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LINGER_S", 0.05)
    config = SamplerConfig(base_model=str(qwen3_folder), store=str(tmp_path), device="cpu")
    service = SamplerService(config, Metrics())
    await service.start()
    CALLER.set(Caller("ann"))
    model, held = await service._model(), service._streams._held

    async def leave(request_id: str) -> "asyncio.Task[None]":
        """Reads a little, and returns what goes on then."""
        asked = request(request_id=request_id, params={"max_tokens": 1000})
        async with aclosing(service._streams.read(parse_stream_sample(asked, model))) as parts:
            await anext(parts)
        (stream,) = held.values()
        return stream.filling

    try:
        filling = await leave("given-up")
        assert not filling.done()
        await asyncio.wait([filling])
        assert filling.cancelled()
        assert not held
        monkeypatch.setattr(streams, "LINGER_S", 1e6)
        filling = await leave("drained")
    finally:
        await service.stop()
    await asyncio.wait([filling])
    assert filling.cancelled()
    assert not held

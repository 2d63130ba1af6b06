"""Who reads a request before the engine has it."""

import threading
from typing import Any

from mint_core.rpc.caller import CALLER, Caller
from mint_core.turns import Workers
from mintrpc.v1 import sampler_pb2
from sampler_service.jobs import Sampling
from sampler_service.requests import parse_sample
from sampler_service.servicer import SamplerServicer
from tests.unit.sampler_service.test_requests import MODEL, sample


async def test_a_large_request_is_read_beside_the_event_loop() -> None:
    threads: list[str] = []

    async def model() -> Any:
        return MODEL

    def noting(request: sampler_pb2.SampleRequest, known: Any) -> Sampling:
        threads.append(threading.current_thread().name)
        return parse_sample(request, known)

    servicer = SamplerServicer(model, None, None, None)  # type: ignore[arg-type]
    who = Caller("t", parsers=Workers(1, "parsing"))
    CALLER.set(who)
    for request in (sample(), sample(stop_token_ids=[7] * 70_000)):
        who.request_bytes = request.ByteSize()
        await servicer._parse(noting, request)

    assert threads == [threading.current_thread().name, "parsing_0"]

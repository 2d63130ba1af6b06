"""SamplerService's methods: parse, call, reply."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from google.protobuf.message import Message

from mint_core.engine_host.pipe import ModelDescription
from mint_core.rpc.caller import parsed
from mintrpc.v1 import sampler_pb2, sampler_pb2_grpc
from sampler_service import responses
from sampler_service.execution import Execution
from sampler_service.jobs import Sampling
from sampler_service.requests import parse_compute_logprobs, parse_sample, parse_stream_sample

R = TypeVar("R", bound=Message)


class SamplerServicer(sampler_pb2_grpc.SamplerServiceServicer):
    """A call that its caller leaves is cancelled, and so is its work in the engine."""

    def __init__(
        self, model: Callable[[], Awaitable[ModelDescription]], execution: Execution
    ) -> None:
        self._model = model
        self._execution = execution

    async def Sample(
        self, request: sampler_pb2.SampleRequest, context: Any
    ) -> sampler_pb2.SampleResponse:
        """See sampler.proto."""
        sampling = await self._parse(parse_sample, request)
        generated, revision_path = await self._execution.sample(sampling)
        return responses.sample_response(generated, sampling.choice.seed, revision_path)

    async def StreamSample(
        self, request: sampler_pb2.StreamSampleRequest, context: Any
    ) -> AsyncGenerator[sampler_pb2.StreamSampleResponse, None]:
        """See sampler.proto."""
        sampling = await self._parse(parse_stream_sample, request)
        async with aclosing(self._execution.stream(sampling)) as parts:
            async for part, revision_path in parts:
                yield responses.stream_sample_response(part, sampling.choice.seed, revision_path)

    async def ComputeLogprobs(
        self, request: sampler_pb2.ComputeLogprobsRequest, context: Any
    ) -> sampler_pb2.ComputeLogprobsResponse:
        """See sampler.proto."""
        sampling = await self._parse(parse_compute_logprobs, request)
        generated, revision_path = await self._execution.sample(sampling)
        return responses.compute_logprobs_response(generated, revision_path)

    async def _parse(
        self, parse: Callable[[R, ModelDescription], Sampling], request: R
    ) -> Sampling:
        return await parsed(request.ByteSize(), parse, request, await self._model())

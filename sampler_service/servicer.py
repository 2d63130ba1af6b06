"""SamplerService's methods: parse, call, reply."""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from mint_core.engine_pipe import ModelDescription
from mint_core.errors import Unimplemented
from mintrpc.v1 import sampler_pb2, sampler_pb2_grpc
from sampler_service.jobs import Generated
from sampler_service.requests import Sampling, parse_compute_logprobs, parse_sample
from sampler_service.responses import compute_logprobs_response, sample_response


class Sampler(Protocol):
    """What the servicer calls."""

    async def model(self) -> ModelDescription: ...

    async def generate(self, sampling: Sampling) -> tuple[Generated, str]:
        """The answer, and the revision path that made it."""


class SamplerServicer(sampler_pb2_grpc.SamplerServiceServicer):
    """A call that its caller leaves is cancelled, and so is its work in the engine."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    async def Sample(
        self, request: sampler_pb2.SampleRequest, context: Any
    ) -> sampler_pb2.SampleResponse:
        """See sampler.proto."""
        sampling = parse_sample(request, await self._sampler.model())
        generated, revision_path = await self._sampler.generate(sampling)
        return sample_response(generated, sampling.choice.seed, revision_path)

    async def StreamSample(
        self, request: sampler_pb2.StreamSampleRequest, context: Any
    ) -> AsyncIterator[sampler_pb2.StreamSampleResponse]:
        """See sampler.proto."""
        raise Unimplemented(
            "`StreamSample` is not served by this version; call `Sample`", feature="stream_sample"
        )
        yield  # makes it a generator

    async def ComputeLogprobs(
        self, request: sampler_pb2.ComputeLogprobsRequest, context: Any
    ) -> sampler_pb2.ComputeLogprobsResponse:
        """See sampler.proto."""
        sampling = parse_compute_logprobs(request, await self._sampler.model())
        generated, revision_path = await self._sampler.generate(sampling)
        return compute_logprobs_response(generated, revision_path)

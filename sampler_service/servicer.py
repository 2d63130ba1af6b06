"""SamplerService's methods: parse, call, reply."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from mint_core.engine_host.pipe import ModelDescription
from mint_core.rpc.caller import caller, parsed
from mint_core.text.growing import GrowingText
from mint_core.text.process import TextProcess
from mintrpc.v1 import sampler_pb2, sampler_pb2_grpc, types_pb2
from sampler_service import responses
from sampler_service.execution import Execution
from sampler_service.jobs import Sampling
from sampler_service.requests import parse_compute_logprobs, parse_sample, parse_stream_sample

R = TypeVar("R", bound=Message)


class SamplerServicer(sampler_pb2_grpc.SamplerServiceServicer):
    """A call that its caller leaves is cancelled, and so is its work in the engine."""

    def __init__(
        self,
        model: Callable[[], Awaitable[ModelDescription]],
        execution: Execution,
        texts: TextProcess,
    ) -> None:
        self._model = model
        self._execution = execution
        self._texts = texts

    async def Sample(
        self, request: sampler_pb2.SampleRequest, context: Any
    ) -> sampler_pb2.SampleResponse:
        """See sampler.proto."""
        await self._fill(request.prompt)
        sampling = await self._parse(parse_sample, request)
        generated, revision_path = await self._execution.sample(sampling)
        response = responses.sample_response(generated, sampling.choice.seed, revision_path)
        if request.include_text:
            tokens = [tuple(sequence.tokens) for sequence in response.sequences]
            made = await self._texts.texts(caller().tenant, tokens)
            for sequence, text in zip(response.sequences, made, strict=True):
                sequence.text = text
        return response

    async def StreamSample(
        self, request: sampler_pb2.StreamSampleRequest, context: Any
    ) -> AsyncGenerator[sampler_pb2.StreamSampleResponse, None]:
        """See sampler.proto."""
        await self._fill(request.sample.prompt)
        sampling = await self._parse(parse_stream_sample, request)
        growing = defaultdict[int, GrowingText](partial(GrowingText, self._texts, caller().tenant))
        async with aclosing(self._execution.stream(sampling)) as parts:
            async for part, revision_path in parts:
                seed = sampling.choice.seed
                response = responses.stream_sample_response(part, seed, revision_path)
                if request.sample.include_text:
                    last, text = part.stop_reason is not None, growing[part.sample]
                    response.text = await text.add(list(part.tokens), last=last)
                yield response

    async def ComputeLogprobs(
        self, request: sampler_pb2.ComputeLogprobsRequest, context: Any
    ) -> sampler_pb2.ComputeLogprobsResponse:
        """See sampler.proto."""
        await self._fill(request.prompt)
        sampling = await self._parse(parse_compute_logprobs, request)
        generated, revision_path = await self._execution.sample(sampling)
        return responses.compute_logprobs_response(generated, revision_path)

    async def _fill(self, prompt: types_pb2.ModelInput) -> None:
        await self._model()  # whose tokenizer it is
        await self._texts.fill(caller().tenant, [prompt])

    async def _parse(
        self, parse: Callable[[R, ModelDescription], Sampling], request: R
    ) -> Sampling:
        return await parsed(request.ByteSize(), parse, request, await self._model())

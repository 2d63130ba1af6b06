"""SamplerService's methods: parse, call, reply."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from google.protobuf.message import Message

from mint_core.engine_host.pipe import ModelDescription
from mint_core.rpc.caller import caller, parsed
from mint_core.text.growing import GrowingText
from mint_core.text.process import TextProcess
from mintrpc.v1 import sampler_pb2, sampler_pb2_grpc, types_pb2
from sampler_service import responses
from sampler_service.execution import Execution
from sampler_service.requests import parse_compute_logprobs, parse_sample, parse_stream_sample
from sampler_service.streams import Streams

R = TypeVar("R", bound=Message)
P = TypeVar("P")


class SamplerServicer(sampler_pb2_grpc.SamplerServiceServicer):
    """A call that its caller leaves is cancelled, and so is its work in the engine."""

    def __init__(
        self,
        model: Callable[[], Awaitable[ModelDescription]],
        execution: Execution,
        streams: Streams,
        texts: TextProcess,
    ) -> None:
        self._model = model
        self._execution = execution
        self._streams = streams
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
        asked = await self._parse(parse_stream_sample, request)
        seed, told = asked.sampling.choice.seed, [len(tokens) for tokens in asked.received]
        growing: dict[int, GrowingText] = {}
        async with aclosing(self._streams.read(asked)) as parts:
            async for part, revision_path in parts:
                index = part.sample
                response = responses.stream_sample_response(part, told[index], seed, revision_path)
                if request.sample.include_text and part.tokens:
                    if index not in growing:
                        growing[index] = await self._text(asked.received[index].tolist())
                    last = part.stop_reason is not None
                    response.text = await growing[index].add(list(part.tokens), last=last)
                told[index] += len(part.tokens)
                yield response

    async def ComputeLogprobs(
        self, request: sampler_pb2.ComputeLogprobsRequest, context: Any
    ) -> sampler_pb2.ComputeLogprobsResponse:
        """See sampler.proto."""
        await self._fill(request.prompt)
        sampling = await self._parse(parse_compute_logprobs, request)
        generated, revision_path = await self._execution.sample(sampling)
        return responses.compute_logprobs_response(generated, revision_path)

    async def _text(self, received: list[int]) -> GrowingText:
        """That of a continuation whose reader has these tokens, and their text."""
        text = GrowingText(self._texts, caller().tenant)
        if received:
            await text.add(received, last=False)
        return text

    async def _fill(self, prompt: types_pb2.ModelInput) -> None:
        await self._model()  # whose tokenizer it is
        await self._texts.fill(caller().tenant, [prompt])

    async def _parse(self, parse: Callable[[R, ModelDescription], P], request: R) -> P:
        return await parsed(parse, request, await self._model())

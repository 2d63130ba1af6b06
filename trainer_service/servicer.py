"""The RPCs of TrainerService."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from google.protobuf.message import Message

from mint_core.rpc.caller import caller, note, records_refusals
from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc
from trainer_service.queue.scheduler import Scheduler
from trainer_service.run.calls import Call, Outcome
from trainer_service.run_directory import RunDirectory
from trainer_service.runs import Runs
from trainer_service.wire import requests, responses
from trainer_service.wire.sequenced_requests import LARGE_BYTES, parse_call


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Parses, asks the runs, answers."""

    def __init__(self, runs: Runs, directory: RunDirectory, scheduler: Scheduler) -> None:
        self._runs = runs
        self._directory = directory
        self._scheduler = scheduler

    async def CreateTrainingRun(
        self, request: trainer_pb2.CreateTrainingRunRequest, context: Any
    ) -> trainer_pb2.CreateTrainingRunResponse:
        """See trainer.proto."""
        parsed = requests.parse_create(request, self._scheduler.model)
        return responses.create_response(await self._runs.create(caller().tenant, parsed))

    async def OpenTrainingRun(
        self, request: trainer_pb2.OpenTrainingRunRequest, context: Any
    ) -> trainer_pb2.OpenTrainingRunResponse:
        """See trainer.proto."""
        parsed = requests.parse_open(request)
        return responses.open_response(await self._runs.open(caller().tenant, parsed))

    async def GetTrainingRun(
        self, request: trainer_pb2.GetTrainingRunRequest, context: Any
    ) -> trainer_pb2.GetTrainingRunResponse:
        """See trainer.proto."""
        run_id = requests.run_id(request.training_run_id)
        run = await self._directory.get(caller().tenant, run_id)
        return trainer_pb2.GetTrainingRunResponse(training_run=responses.run_message(run))

    async def ListTrainingRuns(
        self, request: trainer_pb2.ListTrainingRunsRequest, context: Any
    ) -> trainer_pb2.ListTrainingRunsResponse:
        """See trainer.proto."""
        page = await self._directory.list(caller().tenant, requests.parse_list(request))
        return responses.list_response(page)

    async def UpdateTrainingRun(
        self, request: trainer_pb2.UpdateTrainingRunRequest, context: Any
    ) -> trainer_pb2.UpdateTrainingRunResponse:
        """See trainer.proto."""
        view = await self._runs.update(caller().tenant, requests.parse_update(request))
        return trainer_pb2.UpdateTrainingRunResponse(training_run=responses.run_message(view))

    async def DeleteTrainingRun(
        self, request: trainer_pb2.DeleteTrainingRunRequest, context: Any
    ) -> trainer_pb2.DeleteTrainingRunResponse:
        """See trainer.proto."""
        await self._directory.delete(caller().tenant, requests.parse_delete(request))
        return trainer_pb2.DeleteTrainingRunResponse()

    @records_refusals
    async def Forward(
        self, request: trainer_pb2.ForwardRequest, context: Any
    ) -> trainer_pb2.ForwardResponse:
        """See trainer.proto."""
        return responses.forward_response(await self._sequenced(request))

    @records_refusals
    async def ForwardBackward(
        self, request: trainer_pb2.ForwardBackwardRequest, context: Any
    ) -> trainer_pb2.ForwardBackwardResponse:
        """See trainer.proto."""
        return responses.forward_backward_response(await self._sequenced(request))

    @records_refusals
    async def OptimStep(
        self, request: trainer_pb2.OptimStepRequest, context: Any
    ) -> trainer_pb2.OptimStepResponse:
        """See trainer.proto."""
        return responses.optim_step_response(await self._sequenced(request))

    @records_refusals
    async def DiscardGradient(
        self, request: trainer_pb2.DiscardGradientRequest, context: Any
    ) -> trainer_pb2.DiscardGradientResponse:
        """See trainer.proto."""
        return responses.discard_response(await self._sequenced(request))

    @records_refusals
    async def SaveState(
        self, request: trainer_pb2.SaveStateRequest, context: Any
    ) -> trainer_pb2.SaveStateResponse:
        """See trainer.proto."""
        return responses.save_state_response(await self._sequenced(request))

    @records_refusals
    async def LoadState(
        self, request: trainer_pb2.LoadStateRequest, context: Any
    ) -> trainer_pb2.LoadStateResponse:
        """See trainer.proto."""
        return responses.load_state_response(await self._sequenced(request))

    @records_refusals
    async def SaveWeightsForSampler(
        self, request: trainer_pb2.SaveWeightsForSamplerRequest, context: Any
    ) -> trainer_pb2.SaveWeightsForSamplerResponse:
        """See trainer.proto."""
        return responses.save_for_sampler_response(await self._sequenced(request))

    async def WatchTrainingRun(
        self, request: trainer_pb2.WatchTrainingRunRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.WatchTrainingRunResponse]:
        """See trainer.proto."""
        watch = self._runs.watch(caller().tenant, requests.run_id(request.training_run_id))
        async with aclosing(watch.events()) as events:
            async for event in events:
                yield responses.watch_response(event)

    async def _sequenced(self, request: Message) -> Outcome:
        call = await self._parse(request)
        try:
            return await self._runs.submit(caller().tenant, call)
        finally:
            _note(call)

    async def _parse(self, request: Message) -> Call:
        model, refusals = self._scheduler.model, caller().refusals
        if request.ByteSize() < LARGE_BYTES:
            return parse_call(request, model, refusals)
        return await asyncio.to_thread(parse_call, request, model, refusals)


def _note(call: Call) -> None:
    """Adds to the log line what only a call that acted has."""
    if call.tokens:
        note(tokens=call.tokens)
    course = call.course
    if course.wait_s is not None:
        note(wait_s=course.wait_s, run_s=course.run_s)
    if course.deaths:
        note(engine_deaths=course.deaths)

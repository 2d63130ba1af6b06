"""The RPCs of TrainerService.

The answers to what is executed once are bytes, made when it was.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from google.protobuf.message import Message

from mint_core.errors import InvalidRequest
from mint_core.rpc.caller import caller, note, parsed, records_refusals
from mint_core.rpc.errors import code_of
from mint_core.text.process import TextProcess
from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc
from trainer_service.calls import Call
from trainer_service.groups.groups import Groups
from trainer_service.jobs import most_targets
from trainer_service.queue.planner import most_tile_tokens
from trainer_service.run.watching import CallEnd, Event, QueueProgress
from trainer_service.run_description import RunView
from trainer_service.run_directory import RunDirectory
from trainer_service.runs import Runs
from trainer_service.wire import requests, responses
from trainer_service.wire.sequenced_requests import parse_call

Encoded = Any  # bytes of a response, of which the generated types know nothing


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Parses, asks the runs, answers."""

    def __init__(
        self, runs: Runs, directory: RunDirectory, groups: Groups, texts: TextProcess
    ) -> None:
        self._texts = texts
        self._runs = runs
        self._directory = directory
        self._groups = groups

    async def CreateTrainingRun(
        self, request: trainer_pb2.CreateTrainingRunRequest, context: Any
    ) -> Encoded:
        """See trainer.proto."""
        parsed = requests.parse_create(request, self._groups.model)
        answer = await self._runs.create(caller().tenant, parsed)
        made = trainer_pb2.CreateTrainingRunResponse.FromString(answer)
        note(run=made.training_run.training_run_id)
        return answer

    async def OpenTrainingRun(
        self, request: trainer_pb2.OpenTrainingRunRequest, context: Any
    ) -> Encoded:
        """See trainer.proto."""
        parsed = requests.parse_open(request)
        return await self._runs.open(caller().tenant, parsed)

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
    ) -> Encoded:
        """See trainer.proto."""
        return await self._runs.update(caller().tenant, requests.parse_update(request))

    async def DeleteTrainingRun(
        self, request: trainer_pb2.DeleteTrainingRunRequest, context: Any
    ) -> Encoded:
        """See trainer.proto."""
        return await self._directory.delete(caller().tenant, requests.parse_delete(request))

    @records_refusals
    async def _sequenced(self, request: Message, context: Any) -> Encoded:
        """See trainer.proto: any of the calls that have a number."""
        if isinstance(request, trainer_pb2.ForwardRequest | trainer_pb2.ForwardBackwardRequest):
            await self._fill(request)
        call = await self._parse(request)
        try:
            return await self._runs.submit(caller().tenant, call)
        finally:
            _note(call)

    Forward = _sequenced
    ForwardBackward = _sequenced
    OptimStep = _sequenced
    DiscardGradient = _sequenced
    SaveState = _sequenced
    LoadState = _sequenced
    SaveWeightsForSampler = _sequenced

    async def WatchTrainingRun(
        self, request: trainer_pb2.WatchTrainingRunRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.WatchTrainingRunResponse]:
        """See trainer.proto."""
        run_id, after = requests.run_id(request.training_run_id), request.resume_after
        async with aclosing(self._runs.watch(caller().tenant, run_id, after)) as events:
            async for event in events:
                yield _watch_response(event)

    async def _fill(
        self, request: trainer_pb2.ForwardRequest | trainer_pb2.ForwardBackwardRequest
    ) -> None:
        """Turns texts into tokens. What is refused of them is refused as any content is."""
        try:
            await self._texts.fill(caller().tenant, (datum.model_input for datum in request.data))
        except InvalidRequest as error:
            caller().refusals.append(error)

    async def _parse(self, request: Message) -> Call:
        model = self._groups.model
        most = most_targets(most_tile_tokens(self._groups.max_batch_tokens))
        most = min(most, model.vocabulary_size)
        parse = partial(parse_call, request, model, caller().refusals, most_targets=most)
        return await parsed(parse)


def _note(call: Call) -> None:
    """Adds to the log line what only a call that acted has."""
    if call.tokens:
        note(tokens=call.tokens)
    course = call.course
    if course.wait_s is not None:
        note(wait_s=course.wait_s, run_s=course.run_s)
    if course.deaths:
        note(engine_deaths=course.deaths)


def _watch_response(event: Event) -> trainer_pb2.WatchTrainingRunResponse:
    response = trainer_pb2.WatchTrainingRunResponse(
        event_time=event.time, event_number=event.number
    )
    match event.what:
        case RunView() as view:
            response.training_run.CopyFrom(responses.run_message(view))
        case QueueProgress(waiting_calls, forecast):
            response.queue_progress.waiting_calls = waiting_calls
            response.queue_progress.tokens_ahead = forecast.tokens_ahead
            if forecast.wait_s is not None:
                response.queue_progress.estimated_wait.FromNanoseconds(round(forecast.wait_s * 1e9))
        case CallEnd() as end:
            response.call_outcome.CopyFrom(_call_outcome(end))
    return response


def _call_outcome(end: CallEnd) -> trainer_pb2.CallOutcome:
    return trainer_pb2.CallOutcome(
        sequence=end.sequence,
        method=end.method,
        step=end.step,
        code=code_of(end.error).value[0] if end.error else 0,
        metrics=end.metrics,
        missed_outcomes=end.missed,
    )

"""Training runs as a server keeps them: create, open, list, change, delete."""

from collections.abc import Callable, Mapping
from typing import Any

from mint import types
from mint._transport.call import Call, check_size, new_request_id
from mint._transport.connection import Connection
from mint._transport.failures import Failure
from mint.types._checks import choice, integer, switch, text, text_map
from mintrpc.v1 import trainer_pb2

Opened = trainer_pb2.OpenTrainingRunResponse


def create_run(
    connection: Connection, request: trainer_pb2.CreateTrainingRunRequest
) -> Call[Opened]:
    """Creates a run, which is open then."""
    request.request_id = new_request_id()
    check_size(connection, request, "user_metadata")
    return Call(connection, connection.trainer.CreateTrainingRun, request, _created)


def open_run(
    connection: Connection,
    training_run_id: str,
    ended: Callable[[Opened | Failure], None] | None = None,
) -> Call[Opened]:
    """Takes a run over from whoever used it before. `ended` is that of the call."""
    request = trainer_pb2.OpenTrainingRunRequest(
        training_run_id=text(training_run_id, _ID), request_id=new_request_id()
    )
    method = connection.trainer.OpenTrainingRun
    return Call(connection, method, request, lambda answer: answer, ended=ended)


def get_run(connection: Connection, training_run_id: str) -> Call[types.TrainingRun]:
    request = trainer_pb2.GetTrainingRunRequest(training_run_id=text(training_run_id, _ID))
    return Call(connection, connection.trainer.GetTrainingRun, request, _run)


def list_runs(
    connection: Connection,
    *,
    page_size: int,
    page_token: str = "",
    skip: int = 0,
    metadata: Mapping[str, str] | None = None,
    kind: types.RunKind | None = None,
) -> Call[types.ListTrainingRunsResponse]:
    request = trainer_pb2.ListTrainingRunsRequest(
        page_size=integer(page_size, "page_size"),
        page_token=text(page_token, "page_token"),
        metadata_filter=text_map(metadata, "metadata_filter"),
        skip=integer(skip, "offset"),
    )
    if kind is not None:
        remedy = "give 'trained' or 'uploaded', or None for all"
        request.kind = choice(trainer_pb2.TrainingRun.Kind, kind, "kind", remedy)
    convert = types.ListTrainingRunsResponse.from_proto
    return Call(connection, connection.trainer.ListTrainingRuns, request, convert)


def update_run(
    connection: Connection, training_run_id: str, metadata: Mapping[str, str]
) -> Call[types.TrainingRun]:
    request = trainer_pb2.UpdateTrainingRunRequest(
        training_run_id=text(training_run_id, _ID),
        request_id=new_request_id(),
        metadata=text_map(metadata, "metadata"),
    )
    return Call(connection, connection.trainer.UpdateTrainingRun, request, _run)


def delete_run(
    connection: Connection, training_run_id: str, delete_checkpoints: bool
) -> Call[None]:
    request = trainer_pb2.DeleteTrainingRunRequest(
        training_run_id=text(training_run_id, _ID),
        request_id=new_request_id(),
        delete_checkpoints=switch(delete_checkpoints, "delete_checkpoints"),
    )
    return Call(connection, connection.trainer.DeleteTrainingRun, request, lambda answer: None)


_ID = "training_run_id"


def _run(answer: Any) -> types.TrainingRun:
    return types.TrainingRun.from_proto(answer.training_run)


def _created(answer: trainer_pb2.CreateTrainingRunResponse) -> Opened:
    return Opened(
        training_run=answer.training_run,
        writer_epoch=answer.writer_epoch,
        next_sequence=max(1, answer.training_run.next_sequence),
        step=answer.training_run.step,
    )

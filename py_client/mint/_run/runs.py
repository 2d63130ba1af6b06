"""Training runs as a server keeps them: create, open, list, change, delete."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from mint import types
from mint._run.run_calls import Opened
from mint._transport.call import Call, Question, Refusal, ask, check_size, new_request_id
from mint._transport.connection import Connection
from mint.types.params import integer, text, text_map
from mint.types.responses import run_kind
from mintrpc.v1 import trainer_pb2

M = TypeVar("M", bound=Message)


def create_run(connection: Connection, request: trainer_pb2.CreateTrainingRunRequest) -> Opened:
    """Creates a run, which is open then."""
    request.request_id = new_request_id()
    check_size(connection, request, "user_metadata")
    created = ask(connection, connection.trainer.CreateTrainingRun, request, _same)
    return Opened(
        training_run=created.training_run,
        writer_epoch=created.writer_epoch,
        next_sequence=max(1, created.training_run.next_sequence),
        step=created.training_run.step,
    )


def open_run(connection: Connection, training_run_id: str) -> Opened:
    """Takes a run over from whoever used it before."""
    return ask(connection, connection.trainer.OpenTrainingRun, _opening(training_run_id), _same)


def open_run_again(
    connection: Connection, training_run_id: str, ended: Callable[[Opened | Refusal], None]
) -> None:
    """As `open_run`, without waiting."""
    Call(connection, connection.trainer.OpenTrainingRun, _opening(training_run_id), ended).start()


def get_run(connection: Connection, training_run_id: str) -> Question:
    request = trainer_pb2.GetTrainingRunRequest(training_run_id=text(training_run_id, _ID))
    return Question(connection.trainer.GetTrainingRun, request, _run)


def list_runs(
    connection: Connection,
    *,
    page_size: int,
    page_token: str = "",
    skip: int = 0,
    metadata: Mapping[str, str] | None = None,
    kind: types.RunKind | None = None,
) -> Question:
    request = trainer_pb2.ListTrainingRunsRequest(
        page_size=integer(page_size, "page_size"),
        page_token=text(page_token, "page_token"),
        metadata_filter=text_map(metadata, "metadata_filter"),
        skip=integer(skip, "offset"),
    )
    if kind is not None:
        request.kind = run_kind(kind)
    convert = types.ListTrainingRunsResponse.from_proto
    return Question(connection.trainer.ListTrainingRuns, request, convert)


def update_run(
    connection: Connection, training_run_id: str, metadata: Mapping[str, str]
) -> Question:
    request = trainer_pb2.UpdateTrainingRunRequest(
        training_run_id=text(training_run_id, _ID),
        request_id=new_request_id(),
        metadata=text_map(metadata, "metadata"),
    )
    return Question(connection.trainer.UpdateTrainingRun, request, _run)


def delete_run(connection: Connection, training_run_id: str, delete_checkpoints: bool) -> Question:
    request = trainer_pb2.DeleteTrainingRunRequest(
        training_run_id=text(training_run_id, _ID),
        request_id=new_request_id(),
        delete_checkpoints=delete_checkpoints,
    )
    return Question(connection.trainer.DeleteTrainingRun, request, lambda answer: None)


_ID = "training_run_id"


def _run(answer: Any) -> types.TrainingRun:
    return types.TrainingRun.from_proto(answer.training_run)


def _opening(training_run_id: str) -> trainer_pb2.OpenTrainingRunRequest:
    return trainer_pb2.OpenTrainingRunRequest(
        training_run_id=text(training_run_id, _ID), request_id=new_request_id()
    )


def _same(answer: M) -> M:
    return answer

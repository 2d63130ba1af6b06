"""What is asked about checkpoints."""

from collections.abc import Mapping
from typing import Any

from mint._transport.connection import Connection
from mint._transport.question import Question, new_request_id
from mint.errors import refused
from mint.types._checks import integer, text, text_map, ttl
from mint.types.checkpoints import (
    KIND_OF_TYPE,
    Checkpoint,
    CheckpointsListResponse,
    CheckpointType,
    ExportResponse,
)
from mintrpc.v1 import checkpoint_pb2

MAX_PAGE_SIZE = 1000
_DTYPES: Mapping[str | None, checkpoint_pb2.ExportDtype] = {
    None: checkpoint_pb2.EXPORT_DTYPE_UNSPECIFIED,
    "float32": checkpoint_pb2.EXPORT_DTYPE_FLOAT32,
    "bfloat16": checkpoint_pb2.EXPORT_DTYPE_BFLOAT16,
    "float16": checkpoint_pb2.EXPORT_DTYPE_FLOAT16,
}


def get_checkpoint(connection: Connection, path: str) -> Question[Checkpoint]:
    request = checkpoint_pb2.GetCheckpointRequest(path=text(path, "path"))
    return Question(connection, connection.checkpoints.GetCheckpoint, request, _checkpoint)


def list_checkpoints(
    connection: Connection,
    *,
    limit: int,
    offset: int = 0,
    training_run_id: str = "",
    checkpoint_type: CheckpointType | None = None,
    metadata: Mapping[str, str] | None = None,
    page_token: str = "",
) -> Question[checkpoint_pb2.ListCheckpointsResponse]:
    """The answer is read as the message, which has the token of the next page."""
    request = checkpoint_pb2.ListCheckpointsRequest(
        training_run_id=text(training_run_id, "training_run_id"),
        page_size=page_size(limit),
        page_token=page_token,
        metadata_filter=text_map(metadata, "metadata_filter"),
        skip=integer(offset, "offset"),
    )
    if checkpoint_type is not None:
        if checkpoint_type not in KIND_OF_TYPE:
            raise refused(
                "checkpoint_type",
                f"is {checkpoint_type!r}; give one of {', '.join(KIND_OF_TYPE)}, or None for all",
            )
        request.kind = KIND_OF_TYPE[checkpoint_type]  # type: ignore[assignment]
    return Question(
        connection, connection.checkpoints.ListCheckpoints, request, lambda answer: answer
    )


def all_checkpoints(connection: Connection, training_run_id: str) -> CheckpointsListResponse:
    """All named checkpoints of a run, page by page."""
    found: list[Checkpoint] = []
    token = ""
    while True:
        page = list_checkpoints(
            connection, limit=MAX_PAGE_SIZE, training_run_id=training_run_id, page_token=token
        ).ask()
        found += map(Checkpoint.from_proto, page.checkpoints)
        if not (token := page.next_page_token):
            return CheckpointsListResponse(found)


def set_lifetime(
    connection: Connection, path: str, ttl_seconds: float | None
) -> Question[Checkpoint]:
    request = _update(path)
    if (duration := ttl(ttl_seconds)) is None:
        request.keep = True
    else:
        request.ttl.CopyFrom(duration)
    return Question(connection, connection.checkpoints.UpdateCheckpoint, request, _checkpoint)


def set_metadata(
    connection: Connection, path: str, metadata: Mapping[str, str]
) -> Question[Checkpoint]:
    request = _update(path)
    request.metadata.SetInParent()
    request.metadata.entries.update(text_map(metadata, "user_metadata"))
    return Question(connection, connection.checkpoints.UpdateCheckpoint, request, _checkpoint)


def copy_checkpoint(
    connection: Connection, path: str, name: str, ttl_seconds: float | None
) -> Question[Checkpoint]:
    request = checkpoint_pb2.CopyCheckpointRequest(
        path=text(path, "path"),
        request_id=new_request_id(),
        name=text(name, "name"),
        ttl=ttl(ttl_seconds),
    )
    return Question(connection, connection.checkpoints.CopyCheckpoint, request, _checkpoint)


def delete_checkpoint(connection: Connection, path: str) -> Question[None]:
    request = checkpoint_pb2.DeleteCheckpointRequest(
        path=text(path, "path"), request_id=new_request_id()
    )
    return Question(
        connection, connection.checkpoints.DeleteCheckpoint, request, lambda answer: None
    )


def export_checkpoint(
    connection: Connection, path: str, dtype: str | None, ttl_seconds: float | None
) -> Question[ExportResponse]:
    if dtype not in _DTYPES:
        raise refused(
            "dtype",
            f"is {dtype!r}; give float32, bfloat16 or float16, or None for the base model's own",
        )
    request = checkpoint_pb2.ExportCheckpointRequest(
        path=text(path, "path"),
        request_id=new_request_id(),
        dtype=_DTYPES[dtype],
        ttl=ttl(ttl_seconds),
    )
    return Question(
        connection, connection.checkpoints.ExportCheckpoint, request, ExportResponse.from_proto
    )


def page_size(limit: int) -> int:
    """How many entries to ask for at once."""
    if not 1 <= integer(limit, "limit") <= MAX_PAGE_SIZE:
        raise refused(
            "limit", f"is {limit}; it must be 1 to {MAX_PAGE_SIZE}, and `offset` gives the rest"
        )
    return int(limit)


def _checkpoint(answer: Any) -> Checkpoint:
    return Checkpoint.from_proto(answer.checkpoint)


def _update(path: str) -> checkpoint_pb2.UpdateCheckpointRequest:
    return checkpoint_pb2.UpdateCheckpointRequest(
        path=text(path, "path"), request_id=new_request_id()
    )

"""How a failed RPC reads: one table from gRPC status to exception."""

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from mint import errors

_DOMAIN = "mint"
_DETAILS_KEY = "grpc-status-details-bin"
_Code = grpc.StatusCode

_CLASSES: dict[grpc.StatusCode, type[errors.APIError]] = {
    _Code.INVALID_ARGUMENT: errors.BadRequestError,
    _Code.FAILED_PRECONDITION: errors.BadRequestError,
    _Code.OUT_OF_RANGE: errors.BadRequestError,
    _Code.UNAUTHENTICATED: errors.AuthenticationError,
    _Code.PERMISSION_DENIED: errors.PermissionDeniedError,
    _Code.NOT_FOUND: errors.NotFoundError,
    _Code.ALREADY_EXISTS: errors.ConflictError,
    _Code.ABORTED: errors.ConflictError,
    _Code.RESOURCE_EXHAUSTED: errors.RateLimitError,
    _Code.INTERNAL: errors.InternalServerError,
    _Code.UNIMPLEMENTED: errors.InternalServerError,
    _Code.UNAVAILABLE: errors.APIConnectionError,
    _Code.DEADLINE_EXCEEDED: errors.APITimeoutError,
}
_NOT_IMPLEMENTED = 501


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed attempt said."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    field: str = ""
    retry_after_s: float | None = None

    @property
    def consumed(self) -> bool:
        """Whether this is the recorded outcome of a sequenced call, which uses up its number. What
        is not our server's word (gRPC's own, or a proxy's) never says so.
        """
        return "next_sequence" in self.metadata


def failure_of(rpc: Any) -> Failure:
    """Reads status and details of an ended RPC, or of the error that it raised."""
    code, message = rpc.code(), rpc.details() or ""
    failure = {"reason": "", "field": ""}
    metadata: dict[str, str] = {}
    retry_after_s = None
    for detail in _details(rpc):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            if info.domain == _DOMAIN:
                failure["reason"], metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            failure["field"] = bad.field_violations[0].field if bad.field_violations else ""
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return Failure(code, message, metadata=metadata, retry_after_s=retry_after_s, **failure)


def error_of(failure: Failure) -> errors.APIError:
    """The exception for a failure."""
    kind = _CLASSES.get(failure.code, errors.RequestFailedError)
    error = kind(
        failure.message or f"the server answered {failure.code.name} without a word",
        code=failure.code.name,
        reason=failure.reason,
        metadata=failure.metadata,
        field=failure.field,
    )
    if failure.code is _Code.UNIMPLEMENTED and isinstance(error, errors.APIStatusError):
        error.status_code = _NOT_IMPLEMENTED
    return error


def _details(rpc: Any) -> list[status_pb2.Status]:
    for key, value in rpc.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []

"""Domain errors as gRPC statuses, each with one `ErrorInfo`."""

import logging
import math
import uuid
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from mint_core import errors

logger = logging.getLogger(__name__)

DOMAIN = "mint"
NEXT_SEQUENCE = "next_sequence"  # of a recorded error: the number behind its own

_CODES: dict[type[errors.MintError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.MintError: grpc.StatusCode.INTERNAL,
}

# An error travels in the trailing headers, as text and again in its details; clients take 8 KiB.
_MESSAGE_BYTES = 1024
_VALUE_BYTES = 256
_METADATA_BYTES = 1024


class Recorded(errors.MintError):
    """A refusal that was given before, and is given again to the byte."""

    def __init__(self, encoded: bytes) -> None:
        """`encoded`: of `to_status`. Raises DecodeError if it is no such thing."""
        self.status = status_pb2.Status.FromString(encoded)
        info = error_details_pb2.ErrorInfo()
        if self.status.details:
            self.status.details[0].Unpack(info)
        super().__init__(self.status.message, **info.metadata)
        self.reason = info.reason


def code_of(error: errors.MintError) -> grpc.StatusCode:
    """Returns the code of the nearest class in the table."""
    if isinstance(error, Recorded):
        return next(code for code in grpc.StatusCode if code.value[0] == error.status.code)
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def domain_error(error: Exception) -> errors.MintError:
    """Returns domain errors as they are. Others are our bug: the log has them, the caller an id."""
    if isinstance(error, errors.MintError):
        return error
    incident = uuid.uuid4().hex[:12]
    logger.error("internal error incident=%s", incident, exc_info=error)
    return errors.MintError(
        f"internal error; the server's log has the details under incident {incident}",
        incident=incident,
    )


def to_status(error: errors.MintError) -> status_pb2.Status:
    """Returns the error as it goes on the wire."""
    if isinstance(error, Recorded):
        return error.status
    message = _shorten(error.message, _MESSAGE_BYTES)
    status = status_pb2.Status(code=code_of(error).value[0], message=message)
    for detail in _details(error, message):
        status.details.add().Pack(detail)
    return status


def trailers(error: errors.MintError, status: status_pb2.Status) -> tuple[tuple[str, Any], ...]:
    """Returns what goes with an error: its details, and a word for gRPC's own retries. They wait as
    RetryInfo says, and send nothing again but that and what is UNAVAILABLE.
    """
    details = ("grpc-status-details-bin", status.SerializeToString())
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None and isinstance(error, errors.Unavailable):
        return (details,)
    pushback_ms = -1 if retry_after_s is None else math.ceil(retry_after_s * 1e3)
    return (details, ("grpc-retry-pushback-ms", str(pushback_ms)))


def recorded(status: status_pb2.Status, sequence: int) -> bytes:
    """Encodes a status that is the outcome of that number, and says so: always in the same bytes.

    In the ErrorInfo, which clients read anyway to know whose word an error is: a map of texts that
    every language can read, with no message of ours to generate. It takes no part of its bound.
    """
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    info.metadata[NEXT_SEQUENCE] = str(sequence + 1)
    status.details[0].Pack(info, deterministic=True)
    encoded: bytes = status.SerializeToString(deterministic=True)
    return encoded


def _details(error: errors.MintError, message: str) -> list[Message]:
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=DOMAIN, metadata=_short_metadata(error)
        )
    ]
    if isinstance(error, errors.InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_shorten(error.field, _VALUE_BYTES), description=_shorten(message, _VALUE_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(retry_after_s * 1e9))
        details.append(retry)
    return details


def _short_metadata(error: errors.MintError) -> dict[str, str]:
    room = _METADATA_BYTES
    kept: dict[str, str] = {}
    for key, value in error.metadata.items():
        short = _shorten(value, _VALUE_BYTES)
        room -= len(key) + _size_bytes(short)
        if room >= 0:
            kept[key] = short
    return kept


def _shorten(text: str, limit_bytes: int) -> str:
    """Cuts text so that it takes at most `limit_bytes` in a header."""
    kept = text[:limit_bytes].encode(errors="replace").decode()
    if len(text) <= limit_bytes and _size_bytes(kept) <= limit_bytes:
        return kept
    while _size_bytes(kept) > limit_bytes - 4:
        kept = kept[: len(kept) * 9 // 10]
    return kept + " ..."


def _size_bytes(text: str) -> int:
    """Returns what text takes in a header, where a byte that is no printable ASCII takes three."""
    plain = sum(" " <= character <= "~" for character in text)
    return plain + 3 * (len(text.encode()) - plain)

"""Statuses as exceptions."""

import pickle

import grpc
import pytest

import mint
from mint._transport.failures import Failure, error_of

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "kind", "status_code"),
    [
        (Code.INVALID_ARGUMENT, mint.BadRequestError, 400),
        (Code.FAILED_PRECONDITION, mint.BadRequestError, 400),
        (Code.UNAUTHENTICATED, mint.AuthenticationError, 401),
        (Code.PERMISSION_DENIED, mint.PermissionDeniedError, 403),
        (Code.NOT_FOUND, mint.NotFoundError, 404),
        (Code.ALREADY_EXISTS, mint.ConflictError, 409),
        (Code.ABORTED, mint.ConflictError, 409),
        (Code.RESOURCE_EXHAUSTED, mint.RateLimitError, 429),
        (Code.INTERNAL, mint.InternalServerError, 500),
        (Code.UNIMPLEMENTED, mint.InternalServerError, 501),
    ],
)
def test_each_status_has_a_class(
    code: grpc.StatusCode, kind: type[mint.APIStatusError], status_code: int
) -> None:
    error = error_of(Failure(code, "what happened", "REASON", {"key": "value"}, "field"))

    assert type(error) is kind
    assert isinstance(error, mint.APIStatusError)
    assert error.status_code == status_code
    assert (error.code, error.reason, error.metadata) == (code.name, "REASON", {"key": "value"})
    assert (str(error), error.field) == ("what happened", "field")


def test_connection_trouble_is_told_from_status() -> None:
    unreachable = error_of(Failure(Code.UNAVAILABLE, ""))
    late = error_of(Failure(Code.DEADLINE_EXCEEDED, ""))

    assert type(unreachable) is mint.APIConnectionError
    assert type(late) is mint.APITimeoutError
    assert isinstance(late, mint.APIConnectionError)
    assert isinstance(late, TimeoutError)
    assert not isinstance(late, mint.APIStatusError)
    assert type(error_of(Failure(Code.DATA_LOSS, ""))) is mint.RequestFailedError


def test_one_root_under_both_names() -> None:
    assert mint.TinkerError is mint.MintError
    for name in mint.__all__:
        value = getattr(mint, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, mint.MintError)


@pytest.mark.parametrize(
    "error",
    [
        mint.APITimeoutError("late"),
        mint.InvalidInputError("bad", field="data[1]"),
        mint.NotFoundError("gone", reason="RUN", metadata={"id": "r"}, field="id"),
    ],
)
def test_errors_pickle(error: mint.MintError) -> None:
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__

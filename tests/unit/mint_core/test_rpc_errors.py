"""Domain errors as statuses."""

import pickle

import grpc
import pytest
from google.rpc import error_details_pb2

from mint_core import errors
from mint_core.rpc.errors import code_of, domain_error, to_status


def kinds(base: type[errors.MintError]) -> list[type[errors.MintError]]:
    return [base, *(kind for child in base.__subclasses__() for kind in kinds(child))]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.CheckpointNotFound, grpc.StatusCode.NOT_FOUND),
        (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
        (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
        (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.Aborted, grpc.StatusCode.ABORTED),
        (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
        (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
        (errors.Unimplemented, grpc.StatusCode.UNIMPLEMENTED),
        (errors.EngineFault, grpc.StatusCode.INTERNAL),
        (errors.MintError, grpc.StatusCode.INTERNAL),
    ],
)
def test_each_class_has_its_code(kind: type[errors.MintError], code: grpc.StatusCode) -> None:
    error = kind("what happened")
    assert code_of(error) == code
    assert to_status(error).code == code.value[0]


def test_subclasses_take_the_code_of_the_class_above() -> None:
    class NarrowAborted(errors.Aborted):
        reason = "SEQUENCE_GAP"

    assert code_of(NarrowAborted("gap")) == grpc.StatusCode.ABORTED


def test_every_status_has_exactly_one_error_info() -> None:
    for kind in (errors.InvalidRequest, errors.ResourceExhausted, errors.Unavailable):
        status = to_status(kind("what happened", step=7))
        infos = [d for d in status.details if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
        assert len(infos) == 1
        info = error_details_pb2.ErrorInfo.FromString(infos[0].value)
        assert (info.reason, info.domain, dict(info.metadata)) == (
            kind.reason,
            "mint",
            {"step": "7"},
        )


@pytest.mark.parametrize("text", ["a" * 50_000, "\u4e16" * 9_000, "\x00\n" * 9_000, "\ud800" * 99])
def test_whatever_the_text_the_headers_stay_small(text: str) -> None:
    error = errors.InvalidRequest(text, field=text, **{f"k{n}": text for n in range(50)})
    status = to_status(error)

    in_header = len(status.message.encode("ascii", "backslashreplace"))
    assert in_header + len(status.SerializeToString()) * 4 / 3 < 7_000


def test_a_long_text_is_cut_before_it_is_looked_at() -> None:
    """What somebody sends may be long: to measure it would take as long."""

    class Long(str):
        def encode(self, *arguments: str) -> bytes:
            raise AssertionError("it is looked at")

        __iter__ = encode  # type: ignore[assignment]

    status = to_status(errors.InvalidRequest(Long("\u4e16" * 100_000)))
    assert status.message.endswith("\u4e16 ...")


def test_a_short_text_is_not_cut() -> None:
    assert to_status(errors.NotFound("there is no `x` \u4e16")).message == "there is no `x` \u4e16"


def test_bugs_get_an_incident_and_keep_their_text_to_themselves() -> None:
    error = domain_error(ZeroDivisionError("a secret"))

    assert code_of(error) == grpc.StatusCode.INTERNAL
    assert error.metadata["incident"] in error.message
    assert "secret" not in error.message
    assert domain_error(error) is error


def test_errors_pickle_with_what_they_carry() -> None:
    for error in (
        errors.InvalidRequest("bad", field="data[3]", step=1),
        errors.ResourceExhausted("full", retry_after_s=2.0),
        errors.TrainingRunNotFound("r-1"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert copy.__dict__ == error.__dict__
        assert to_status(copy) == to_status(error)

"""Values on disk and back."""

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_core import errors
from mint_core.errors import InvalidRequest, MintError
from mint_core.lora.spec import AdapterSpec
from mint_core.rpc.errors import to_status
from mintrpc.v1 import trainer_pb2, types_pb2
from tests.engines.echo_jobs import MODEL
from tests.trainer_rpc import datum
from trainer_service.errors import GradientIncomplete, QueueFull, TrainingRunLost
from trainer_service.journal import codec
from trainer_service.run.calls import (
    Call,
    Compute,
    Computed,
    Discarded,
    Loaded,
    Method,
    Outcome,
    Refused,
    Saved,
    Stepped,
)
from trainer_service.run.run import RunOrigin, RunView
from trainer_service.wire.sequenced_requests import parse_call

ORIGIN = RunOrigin(
    training_run_id="run-1",
    tenant="ann",
    number=7,
    base_model="tiny",
    base_fingerprint="f",
    spec=AdapterSpec(rank=4, alpha=8.0, use_rslora=True, seed=2**62, modules=("a.q", "lm_head")),
    trainable_parameter_count=12,
    row_bytes=48,
    create_time=datetime(2026, 11, 26, 1, 2, 3, 456, UTC),
    isolated=True,
    tile_tokens=16,
)
OUTCOMES: list[tuple[Method, Outcome]] = [
    ("OptimStep", Stepped(step=3, metrics={"grad_norm:mean": 0.5, "learning_rate:mean": 1e-4})),
    ("DiscardGradient", Discarded(True)),
    (
        "SaveState",
        Saved(path="mint://p", revision_path="mint://p@1", step=2, gradient_pending=True),
    ),
    (
        "SaveWeightsForSampler",
        Saved(path="mint://p", revision_path="mint://p@1", step=2, gradient_pending=False),
    ),
    ("LoadState", Loaded(step=2, revision_path="mint://p@1", gradient_discarded=True)),
]
ERRORS = [
    InvalidRequest("`data[0]` is bad", field="data[0]", count=3),
    GradientIncomplete(4),
    TrainingRunLost("run-1", "why"),
    errors.EngineFault("gone"),
    errors.MintError("internal", incident="a1"),
    errors.CheckpointNotFound("mint://p"),
    QueueFull(calls=1, tokens=2, max_calls=3, max_tokens=4, retry_after_s=1.0),
]


@pytest.mark.parametrize(("method", "outcome"), OUTCOMES)
def test_outcomes_come_back(method: Method, outcome: Outcome) -> None:
    assert codec.decode_outcome(method, codec.encode_outcome(method, outcome)) == outcome


@given(st.lists(st.lists(st.floats(width=32), max_size=5), max_size=3))
def test_logprobs_come_back_bit_for_bit(values: list[list[float]]) -> None:
    outcome = Computed(
        logprobs=tuple(np.array(each, np.float32) for each in values), metrics={"loss:sum": 0.1}
    )

    found = codec.decode_outcome("Forward", codec.encode_outcome("Forward", outcome))

    assert isinstance(found, Computed)
    assert found.metrics == outcome.metrics
    assert [a.tobytes() for a in found.logprobs] == [a.tobytes() for a in outcome.logprobs]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.reason)
def test_refusals_come_back_as_callers_see_them(error: MintError) -> None:
    found = codec.decode_outcome("OptimStep", codec.encode_outcome("OptimStep", error))

    assert isinstance(found, MintError)
    if isinstance(error, errors.ResourceExhausted):
        error.retry_after_s = None  # what is recorded has none
    assert to_status(found) == to_status(error)


def request() -> trainer_pb2.ForwardBackwardRequest:
    return trainer_pb2.ForwardBackwardRequest(
        training_run_id="run-1",
        sequence=4,
        writer_epoch=2,
        acknowledged_sequence=3,
        data=[datum([1, 2, 3], [0.5, 1.5])],
        cross_entropy=types_pb2.CrossEntropy(),
    )


def test_requests_are_read_again_as_they_were() -> None:
    call = parse_call(request(), MODEL)
    encoded = codec.encode_request(call)

    work = codec.decode_request("ForwardBackward", encoded, MODEL)

    assert isinstance(work, Compute)
    assert isinstance(call.work, Compute)
    (found,), (expected,) = work.documents, call.work.documents
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.weights.tolist() == expected.weights.tolist()
    assert codec.payload(encoded) == call.payload


def test_what_was_refused_stays_refused_for_the_same_reason() -> None:
    call = parse_call(request(), MODEL, [InvalidRequest("`x` is unknown", field="x")])
    assert isinstance(call.work, Refused)
    encoded = codec.encode_request(call)

    work = codec.decode_request("ForwardBackward", encoded, MODEL)

    assert isinstance(work, Refused)
    assert to_status(work.error) == to_status(call.work.error)
    assert codec.payload(encoded) == b""
    assert isinstance(call, Call)


def test_runs_and_their_views_come_back() -> None:
    view = RunView(
        origin=ORIGIN,
        metadata={"a": "b"},
        update_time=datetime(2026, 11, 26, tzinfo=UTC),
        step=3,
        next_sequence=9,
        writer_epoch=2,
        gradient_pending=True,
        backward_count=1,
        lost="",
        trouble="a disk is full",
        inexact_replays=2,
        inexact_note="other bits",
    )

    assert codec.decode_origin(codec.encode_origin(ORIGIN)) == ORIGIN
    assert codec.decode_view(codec.encode_view(view)) == view
    assert codec.decode_view(codec.encode_view(None)) is None

"""Values on disk and back."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_core.errors import InvalidRequest
from mint_core.lora.spec import AdapterSpec
from mint_core.rpc.errors import recorded, to_status
from mintrpc.v1 import trainer_pb2, types_pb2
from tests.engines.echo_jobs import MODEL
from tests.trainer_rpc import datum
from trainer_service.calls import (
    Call,
    Compute,
    Refused,
)
from trainer_service.errors import StateDamaged
from trainer_service.journal import codec
from trainer_service.journal.records import Payload
from trainer_service.run.run import RunOrigin
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
    call = parse_call(request(), MODEL, most_targets=64)
    encoded = codec.encode_payload(call)

    work = codec.decode_payload(found(call, encoded), "run-1", 4, MODEL)

    assert isinstance(work, Compute)
    assert isinstance(call.work, Compute)
    (again,), (expected,) = work.documents, call.work.documents
    assert again.tokens.tolist() == expected.tokens.tolist()
    assert again.weights.tolist() == expected.weights.tolist()
    assert codec.content_of(encoded) == call.payload


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_what_is_not_to_the_bit_what_was_sent_is_damage(place: int, bit: int) -> None:
    call = parse_call(request(), MODEL, most_targets=64)
    encoded = bytearray(codec.encode_payload(call))
    encoded[1 + place % (len(encoded) - 1)] ^= 1 << bit

    for damaged in (bytes(encoded), bytes(encoded)[:-1], b"", b"M"):
        with pytest.raises(StateDamaged, match="run-1"):
            codec.decode_payload(found(call, damaged), "run-1", 4, MODEL)


def test_what_was_refused_stays_refused_for_the_same_reason() -> None:
    call = parse_call(
        request(), MODEL, most_targets=64, refusals=[InvalidRequest("`x` is unknown", field="x")]
    )
    assert isinstance(call.work, Refused)
    encoded = codec.encode_payload(call)

    work = codec.decode_payload(found(call, encoded), "run-1", 4, MODEL)

    assert isinstance(work, Refused)
    assert to_status(work.error).SerializeToString() == recorded(to_status(call.work.error), 4)
    assert codec.content_of(encoded) == b""
    assert isinstance(call, Call)


def found(call: Call, encoded: bytes) -> Payload:
    return Payload(call.method, call.place.payload_hash, encoded)


def test_runs_come_back() -> None:
    assert codec.decode_origin(codec.encode_origin(ORIGIN)) == ORIGIN

"""Nothing in a request's bytes is silently ignored."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mint_core.errors import InvalidRequest
from mint_core.rpc.parsing import parse
from mintrpc.v1 import trainer_pb2, types_pb2

Request = trainer_pb2.ForwardBackwardRequest
UNKNOWN = b"\xa0\x06\x01"  # field number 100


def full_request() -> trainer_pb2.ForwardBackwardRequest:
    tensor = types_pb2.TensorData(dtype=types_pb2.TENSOR_DTYPE_FLOAT32, values=b"\0" * 4)
    return Request(
        training_run_id="r-1",
        data=[
            {"model_input": {"chunks": [{"encoded_text": {"tokens": [1, 2]}}]}},
            {"loss_fn_inputs": {"weights": tensor}},
        ],
        ppo={"clip_low_threshold": 0.0},
    )


def test_a_known_request_comes_back_as_it_was() -> None:
    request = full_request()
    assert parse(Request.FromString, request.SerializeToString()) == request


def test_an_odd_but_legal_encoding_is_accepted() -> None:
    unpacked = types_pb2.EncodedTextChunk.FromString(b"\x08\x01\x08\x02")
    assert list(unpacked.tokens) == [1, 2]
    assert parse(types_pb2.EncodedTextChunk.FromString, b"\x08\x01\x08\x02") == unpacked


@pytest.mark.parametrize(
    "path",
    [
        "",
        "ppo",
        "data[0]",
        "data[0].model_input",
        "data[0].model_input.chunks[0].encoded_text",
        "data[1].loss_fn_inputs.weights",
    ],
)
def test_an_unknown_field_is_found_wherever_it_is(path: str) -> None:
    request = full_request()
    places = {
        "": request,
        "ppo": request.ppo,
        "data[0]": request.data[0],
        "data[0].model_input": request.data[0].model_input,
        "data[0].model_input.chunks[0].encoded_text": (
            request.data[0].model_input.chunks[0].encoded_text
        ),
        "data[1].loss_fn_inputs.weights": request.data[1].loss_fn_inputs["weights"],
    }
    places[path].MergeFromString(UNKNOWN)
    with pytest.raises(InvalidRequest, match=r"field number 100 in .* is unknown") as caught:
        parse(Request.FromString, request.SerializeToString())

    assert caught.value.field == path
    assert caught.value.metadata["field_number"] == "100"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(raw: bytes) -> None:
    try:
        message = parse(Request.FromString, raw)
    except InvalidRequest:
        return
    assert Request.FromString(message.SerializeToString()) == message

"""What does not pass, and what passes, with a real server and a real channel."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mint_core.errors import (
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    TrainingRunNotFound,
)
from mintrpc.v1 import (
    checkpoint_pb2,
    trainer_pb2,
)
from tests.hosted import MAX_MESSAGE_BYTES, RUN, Served, details, reason, refused


async def test_a_domain_error_arrives_with_its_reason_and_metadata(served: Served) -> None:
    served.trainer.error = TrainingRunNotFound("r-1")
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details() == "there is no training run `r-1`; ListTrainingRuns names yours"
    assert reason(error) == ("TRAINING_RUN_NOT_FOUND", {"training_run_id": "r-1"})


async def test_a_bad_field_is_named(served: Served) -> None:
    served.trainer.error = InvalidRequest("`data` is empty; give a datum", field="data")
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    (bad,) = details(error, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("data", "`data` is empty; give a datum")
    ]


async def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    served.trainer.error = ResourceExhausted("the queue is full", retry_after_s=1.5)
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    (retry,) = details(error, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_a_bug_is_internal_and_only_the_log_has_it(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.trainer.error = KeyError("a secret")
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    kind, metadata = reason(error)
    assert kind == "INTERNAL"
    assert metadata["incident"] in str(error.details())
    assert f"incident={metadata['incident']}" in caplog.text
    assert "KeyError: 'a secret'" in caplog.text


@pytest.mark.parametrize("character", ["x", "\u4e16", "\n"])
async def test_a_long_error_is_cut_to_what_headers_hold(served: Served, character: str) -> None:
    long = character * 20_000
    served.trainer.error = NotFound(long, **{f"key{n}": long for n in range(20)})
    error = await refused(served.stub.GetTrainingRun(RUN))

    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert str(error.details()).startswith(character * 50)
    assert str(error.details()).endswith(" ...")


async def test_an_unknown_field_is_refused_with_its_path(served: Served) -> None:
    newer = trainer_pb2.ForwardBackwardRequest(data=[{}, {"model_input": {"chunks": [{}]}}])
    newer.data[1].model_input.chunks[0].encoded_text.tokens.append(3)
    chunk = newer.data[1].model_input.chunks[0].encoded_text
    chunk.MergeFromString(b"\xa0\x06\x01")  # field number 100
    error = await refused(served.stub.ForwardBackward(newer))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "field number 100 in `data[1].model_input.chunks[0].encoded_text`" in str(
        error.details()
    )
    assert "client is newer" in str(error.details())


async def test_an_unknown_field_in_a_map_is_refused(served: Served) -> None:
    newer = trainer_pb2.ForwardBackwardRequest(data=[{}])
    newer.data[0].loss_fn_inputs["weights"].MergeFromString(b"\xa0\x06\x01")
    error = await refused(served.stub.ForwardBackward(newer))

    (bad,) = details(error, error_details_pb2.BadRequest)
    assert bad.field_violations[0].field == "data[0].loss_fn_inputs.weights"


async def test_an_unknown_field_at_the_top_is_refused(served: Served) -> None:
    newer = trainer_pb2.GetTrainingRunRequest.FromString(
        RUN.SerializeToString() + b"\xa2\x06\x02hi"
    )
    error = await refused(served.stub.GetTrainingRun(newer))

    assert "field number 100 in `the request`" in str(error.details())


async def test_bytes_that_are_no_message_are_refused(served: Served) -> None:
    call = served.channel.unary_unary("/mintrpc.v1.TrainerService/GetTrainingRun")
    error = await refused(call(b"\xff\xff\xff"))

    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not this RPC's message" in str(error.details())


async def test_an_unknown_rpc_is_unimplemented_and_says_so(served: Served) -> None:
    for call in (
        served.channel.unary_unary("/mintrpc.v1.TrainerService/Levitate"),
        served.channel.unary_unary("/mintrpc.v9.NoService/GetTrainingRun"),
    ):
        error = await refused(call(b""))

        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "no RPC `/mintrpc.v" in str(error.details())
        assert "version differs" in str(error.details())


async def test_a_method_without_a_body_is_unimplemented(served: Served) -> None:
    error = await refused(served.stub.SaveState(trainer_pb2.SaveStateRequest()))

    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert reason(error) == ("UNIMPLEMENTED", {"method": "SaveState"})
    stream = served.checkpoints.DownloadCheckpoint(checkpoint_pb2.DownloadCheckpointRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_streams_of_answers_pass_the_same_way(served: Served) -> None:
    served.trainer.error = TrainingRunNotFound("r-1")
    stream = served.stub.WatchTrainingRun(trainer_pb2.WatchTrainingRunRequest())
    first = await stream.read()
    assert first.training_run.training_run_id == "default"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()

    assert reason(caught.value)[0] == "TRAINING_RUN_NOT_FOUND"


async def test_leaving_a_stream_ends_its_work_at_once(
    served: Served, call_log: pytest.LogCaptureFixture
) -> None:
    stream = served.stub.WatchTrainingRun(trainer_pb2.WatchTrainingRunRequest())
    await stream.read()
    await served.trainer.started.wait()
    stream.cancel()
    await served.trainer.cancelled.wait()


async def test_streams_of_requests_pass_the_same_way(served: Served) -> None:
    pieces = [checkpoint_pb2.UploadCheckpointRequest(piece={"data": b"12345"}) for _ in range(3)]
    answer = await served.checkpoints.UploadCheckpoint(iter(pieces))
    assert answer.checkpoint.size_bytes == 15
    assert answer.checkpoint.path == "default"

    pieces[1].piece.file_name = "bad"
    error = await refused(served.checkpoints.UploadCheckpoint(iter(pieces)))
    assert reason(error) == ("INVALID_REQUEST", {"field": "piece.file_name"})

    pieces[0].piece.MergeFromString(b"\xa0\x06\x01")
    error = await refused(served.checkpoints.UploadCheckpoint(iter(pieces)))
    assert "field number 100 in `piece`" in str(error.details())


async def test_an_oversize_message_is_refused_by_grpc_itself(served: Served) -> None:
    tokens = b"\0" * (MAX_MESSAGE_BYTES + 1)
    big = trainer_pb2.ForwardBackwardRequest(data=[{"loss_fn_inputs": {"w": {"values": tokens}}}])
    error = await refused(served.stub.ForwardBackward(big))

    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rpc_status.from_call(error) is None

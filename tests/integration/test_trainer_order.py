"""Sequence numbers over the wire: order, repeats, gaps, acknowledgements, writers."""

import random
import uuid

import grpc

from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc, types_pb2
from tests.servers import RunningService
from tests.trainer_rpc import RawRun, create, datum, floats, refused

Stub = trainer_pb2_grpc.TrainerServiceStub


def logprobs(answer: trainer_pb2.ForwardResponse) -> list[list[float]]:
    return [floats(output.logprobs) for output in answer.outputs]


def training(run: RawRun, steps: int) -> list[object]:
    """A loop's requests, in order."""
    requests: list[object] = []
    for step in range(steps):
        requests.append(run.forward_backward(datum([step + 3, 9, 17, 40, 8])))
        requests.append(run.forward_backward(datum([7, step + 5, 30])))
        adam = types_pb2.AdamParams(learning_rate=0.01)
        requests.append(run.optim_step(adam_params=adam, backward_count=2))
    return requests


def final_logprobs(run: RawRun) -> list[list[float]]:
    return logprobs(run.send(run.forward(datum([5, 6, 7, 8, 9]))))


def test_calls_take_effect_in_order_whatever_order_they_arrive_in(trainer_stub: Stub) -> None:
    plain, shuffled = create(trainer_stub), create(trainer_stub)
    for request in training(plain, 4):
        plain.send(request)

    requests = training(shuffled, 4)
    random.Random(3).shuffle(requests)
    for answer in [shuffled.start(request) for request in requests]:
        answer.result()

    assert shuffled.describe().step == 4
    assert final_logprobs(shuffled) == final_logprobs(plain)


def test_a_call_sent_twice_acts_once(trainer_stub: Stub) -> None:
    once, twice = create(trainer_stub), create(trainer_stub)
    for request in training(once, 3):
        once.send(request)

    for request in training(twice, 3):
        answers = [twice.start(request) for _ in range(3)]  # side by side
        first = answers[0].result()
        assert all(answer.result() == first for answer in answers)
        assert twice.send(request) == first  # and later

    assert twice.describe().step == 3
    assert final_logprobs(twice) == final_logprobs(once)


def test_a_repeated_error_is_the_same_error(run: RawRun) -> None:
    request = run.optim_step()
    first = run.refused(request)

    assert first.reason == "NO_GRADIENT"
    assert run.refused(request) == first
    assert first.next_sequence == run.describe().next_sequence == 2


def test_a_refusal_that_is_no_outcome_of_its_number_does_not_say_so(run: RawRun) -> None:
    run.send(run.discard())
    strange = run.optim_step(sequence=2, writer_epoch=9)
    for request in (
        strange,  # which uses up nothing, though it is INVALID_ARGUMENT
        run.optim_step(sequence=-1),
        run.optim_step(sequence=5),  # which comes early
        run.optim_step(sequence=1),  # which was another call's
    ):
        assert run.refused(request).next_sequence is None
    assert run.describe().next_sequence == 2


def test_an_outcome_is_marked_whatever_it_is(run: RawRun) -> None:
    image = datum([5, 6, 7])
    image.model_input.chunks[0].image.data = b"a"
    long = run.save_state("n" * 2000)
    requests = {
        "INVALID_REQUEST": long,  # by a bound, before anything is made of it
        "UNIMPLEMENTED": run.forward(image),
        "NO_GRADIENT": run.optim_step(backward_count=0),
        "CHECKPOINT_NOT_FOUND": run.load_state(f"mint://{run.id}/weights/none"),
    }
    for place, (reason, request) in enumerate(requests.items(), 1):
        error = run.refused(request)
        assert (error.reason, error.next_sequence) == (reason, place + 1)


def test_another_payload_under_a_used_number(run: RawRun) -> None:
    run.send(run.forward_backward(datum([5, 6, 7])))

    other = run.forward_backward(datum([5, 6, 8]), sequence=1)
    error = run.refused(other)

    assert error.code == grpc.StatusCode.ALREADY_EXISTS
    assert error.reason == "SEQUENCE_REUSED"
    assert error.metadata == {"sequence": "1"}


def test_a_gap_is_aborted_naming_the_missing_number(run: RawRun) -> None:
    error = run.refused(run.optim_step(sequence=3))

    assert error.code == grpc.StatusCode.ABORTED
    assert error.reason == "SEQUENCE_GAP"
    assert error.metadata == {"sequence": "3", "missing_sequence": "1"}
    assert run.describe().next_sequence == 1  # nothing was used up


def test_a_call_goes_on_when_its_connection_drops(run: RawRun) -> None:
    request = run.forward_backward(*[datum(list(range(3, 200)))] * 20)
    sent = run.start(request)
    run.wait_until_accepted(1)
    sent.cancel()

    assert len(run.send(request).outputs) == 20
    assert run.describe().gradient_pending


def test_acknowledged_answers_are_gone(run: RawRun) -> None:
    request = run.forward_backward()
    run.send(request)
    run.send(run.forward(acknowledged_sequence=1))

    error = run.refused(request)

    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "ANSWER_ACKNOWLEDGED"
    assert error.retry_after_s is None


def test_what_was_not_answered_cannot_be_acknowledged(run: RawRun) -> None:
    error = run.refused(run.forward_backward(acknowledged_sequence=5))

    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.field == "acknowledged_sequence"
    assert run.describe().next_sequence == 2  # the refusal is the number's outcome


def test_unacknowledged_answers_fill_up(run: RawRun) -> None:
    """The first of them has not been told to anybody, so none is dropped."""
    left = run.start(run.forward_backward(*[datum(list(range(3, 200)))] * 20))
    run.wait_until_accepted(1)
    left.cancel()
    answers = [run.start(run.discard()) for _ in range(62)]
    for _ in range(1024 - 63):  # 64 under way, the most that are held
        answers.append(run.start(run.discard()))
        answers[-63].result()
    for answer in answers:
        answer.result()

    error = run.refused(run.discard())

    assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.reason == "ANSWERS_UNACKNOWLEDGED"
    assert error.retry_after_s == 1
    run.next_sequence = 1025
    run.send(run.discard(acknowledged_sequence=1024))


def open_run(run: RawRun, request_id: str = "") -> trainer_pb2.OpenTrainingRunResponse:
    request = trainer_pb2.OpenTrainingRunRequest(
        training_run_id=run.id, request_id=request_id or uuid.uuid4().hex
    )
    return run.stub.OpenTrainingRun(request)


def test_opening_takes_a_run_over(run: RawRun) -> None:
    run.send(run.forward_backward())
    early = run.start(run.forward_backward(sequence=9))
    run.wait_until_accepted(1)

    opened = open_run(run)

    assert opened.next_sequence == 2
    assert opened.writer_epoch == run.writer_epoch + 1
    assert (opened.gradient_pending, opened.backward_count, opened.step) == (True, 1, 0)
    fenced = run.refused(run.optim_step())
    assert fenced.code == grpc.StatusCode.ABORTED
    assert fenced.reason == "WRITER_FENCED"
    assert early.code() == grpc.StatusCode.ABORTED
    taken = RawRun(run.stub, run.run, opened.writer_epoch, opened.next_sequence)
    assert taken.send(taken.optim_step(backward_count=opened.backward_count)).step == 1


def test_opening_waits_for_accepted_calls(run: RawRun) -> None:
    under_way = run.start(run.forward_backward(*[datum(list(range(3, 200)))] * 20))
    run.wait_until_accepted(1)

    opened = open_run(run)

    assert opened.gradient_pending
    assert opened.backward_count == 1
    assert len(under_way.result().outputs) == 20


def test_openings_at_the_same_time_give_different_epochs(run: RawRun) -> None:
    under_way = run.start(run.forward_backward(*[datum(list(range(3, 200)))] * 20))
    run.wait_until_accepted(1)
    open_async = run.stub.OpenTrainingRun.future

    answers = [
        open_async(
            trainer_pb2.OpenTrainingRunRequest(training_run_id=run.id, request_id=f"{run.id} {n}")
        )
        for n in range(3)
    ]

    assert sorted(answer.result().writer_epoch for answer in answers) == [2, 3, 4]
    assert len(under_way.result().outputs) == 20


def test_the_same_open_twice_is_one(run: RawRun) -> None:
    first = open_run(run, "again")

    assert open_run(run, "again") == first
    assert open_run(run).writer_epoch == first.writer_epoch + 1


def test_getting_a_run_never_fences(run: RawRun) -> None:
    run.describe()

    run.send(run.forward_backward())


def test_an_epoch_that_was_never_given(run: RawRun) -> None:
    run.writer_epoch += 1
    error = run.refused(run.forward_backward())

    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.field == "writer_epoch"
    assert run.describe().next_sequence == 1


def test_an_unknown_field_uses_up_its_number(run: RawRun, trainer: RunningService) -> None:
    request = run.forward_backward()
    with grpc.insecure_channel(trainer.address) as channel:
        call = channel.unary_unary("/mintrpc.v1.TrainerService/ForwardBackward")
        error = refused(call, request.SerializeToString() + b"\xa0\x06\x01")

    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "field number 100 in `the request` is unknown" in error.message
    assert run.describe().next_sequence == 2
    assert run.refused(run.optim_step()).reason == "GRADIENT_INCOMPLETE"

"""No step is ever taken on part of a batch."""

import grpc
import pytest

from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc, types_pb2
from tests.trainer_rpc import RawRun, Refusal, create, datum, floats

Stub = trainer_pb2_grpc.TrainerServiceStub
BAD = datum([5, 600, 7])
ADAM = types_pb2.AdamParams(learning_rate=0.01)


def weights_moved(run: RawRun) -> bool:
    """Whether the logprobs differ from those of a run that never took a step."""
    answers = []
    for each in (run, create(run.stub)):
        answer = each.send(each.forward(datum([5, 6, 7, 8])))
        answers.append(floats(answer.outputs[0].logprobs))
    return answers[0] != answers[1]


def check_refused_step(run: RawRun, error: Refusal, reason: str) -> None:
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == reason
    described = run.describe()
    assert described.step == 0
    assert not described.gradient_pending
    assert not weights_moved(run)
    run.send(run.forward_backward())  # and the run goes on, with a gradient of this batch alone
    assert run.send(run.optim_step(backward_count=1, adam_params=ADAM)).step == 1
    assert weights_moved(run)


def test_a_step_without_a_gradient(run: RawRun) -> None:
    check_refused_step(run, run.refused(run.optim_step()), "NO_GRADIENT")


def test_a_refused_backward_refuses_the_step_and_is_named(run: RawRun) -> None:
    run.send(run.forward_backward())
    bad = run.refused(run.forward_backward(BAD))
    assert bad.code == grpc.StatusCode.INVALID_ARGUMENT
    run.send(run.forward_backward())  # later backwards still run

    error = run.refused(run.optim_step(backward_count=3))

    assert error.metadata == {"failed_sequence": "2"}
    assert "`sequence` 2 failed" in error.message
    check_refused_step(run, error, "GRADIENT_INCOMPLETE")


@pytest.mark.parametrize("count", [0, 2])
def test_a_backward_that_never_reached_the_server(run: RawRun, count: int) -> None:
    run.send(run.forward_backward())

    error = run.refused(run.optim_step(backward_count=count))

    check_refused_step(run, error, "BACKWARD_COUNT_MISMATCH")


def test_a_refused_step_clears_the_gradient(run: RawRun) -> None:
    run.send(run.forward_backward())

    error = run.refused(run.optim_step(adam_params=types_pb2.AdamParams(learning_rate=-1)))

    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.field == "adam_params.learning_rate"
    assert not run.describe().gradient_pending
    assert not weights_moved(run)


def test_a_refused_forward_leaves_the_gradient_alone(run: RawRun) -> None:
    run.send(run.forward_backward())
    run.refused(run.forward(BAD))

    assert run.send(run.optim_step(backward_count=1)).step == 1


def test_a_batch_of_zero_weights_is_a_gradient(run: RawRun) -> None:
    run.send(run.forward_backward(datum([5, 6, 7], [0, 0])))
    assert run.describe().gradient_pending

    answer = run.send(run.optim_step(adam_params=ADAM))

    assert answer.step == 1
    assert answer.metrics["grad_norm:mean"] == 0
    assert not weights_moved(run)


def test_a_discarded_gradient_is_gone(run: RawRun) -> None:
    run.send(run.forward_backward(datum([9, 9, 9])))
    run.refused(run.forward_backward(BAD))

    assert run.send(run.discard()).gradient_discarded
    assert not run.send(run.discard()).gradient_discarded

    run.send(run.forward_backward())
    assert run.send(run.optim_step(backward_count=1)).step == 1


def test_a_gradient_that_is_not_finite(run: RawRun) -> None:
    run.send(run.forward_backward(datum([5, 6, 7], [3e37, 3e37])))

    error = run.refused(run.optim_step())

    check_refused_step(run, error, "GRADIENT_NOT_FINITE")


def test_a_loss_that_is_not_finite(run: RawRun) -> None:
    huge = datum([5, 6, 7], [3e38, 3e38])
    for request in (run.forward(huge), run.forward_backward(huge)):
        error = run.refused(request)
        assert error.reason == "LOSS_NOT_FINITE"
        assert "the loss is not finite" in error.message
    run.send(run.forward_backward())

    check_refused_step(run, run.refused(run.optim_step()), "GRADIENT_INCOMPLETE")


@pytest.mark.parametrize("other", [{"eps": 1e-30}, {"weight_decay": 10.0}])
def test_a_step_that_would_not_be_finite(run: RawRun, other: dict[str, float]) -> None:
    run.send(run.forward_backward())

    error = run.refused(run.optim_step(adam_params={"learning_rate": 3e38, **other}))

    check_refused_step(run, error, "STEP_NOT_FINITE")
    run.send(run.save_state("unharmed"))


def test_backwards_add_up(trainer_stub: Stub) -> None:
    """Several calls are one batch, and one large call is cut into many."""
    data = [datum([3 + i, 9, 17 + i, 40, 8]) for i in range(6)]
    apart, together = create(trainer_stub), create(trainer_stub)
    for each in data:
        apart.send(apart.forward_backward(each))
    together.send(together.forward_backward(*data))

    norms = [
        run.send(run.optim_step(adam_params=ADAM)).metrics["grad_norm:mean"]
        for run in (apart, together)
    ]

    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 0


def test_a_large_call_is_answered_in_its_own_order(run: RawRun) -> None:
    """More tokens than one pass holds, so in several tiles."""
    data = [datum(list(range(3 + i, 40 + 2 * i))) for i in range(40)]

    answer = run.send(run.forward_backward(*data))

    alone = [run.send(run.forward(each)).outputs[0] for each in data[::13]]
    for each, together in zip(alone, answer.outputs[::13], strict=True):
        assert floats(each.logprobs) == pytest.approx(floats(together.logprobs), rel=1e-5, abs=1e-5)
    assert [len(floats(o.logprobs)) for o in answer.outputs] == [36 + i for i in range(40)]
    logprobs = [x for output in answer.outputs for x in floats(output.logprobs)]
    assert answer.metrics["loss:sum"] == pytest.approx(-sum(logprobs), rel=1e-5)
    assert answer.metrics["tokens:sum"] == len(logprobs)


def test_a_neighbours_failure_is_not_mine(trainer_stub: Stub) -> None:
    mine, other = create(trainer_stub), create(trainer_stub)
    mine.send(mine.forward_backward())
    other.refused(other.forward_backward(BAD))

    assert mine.send(mine.optim_step()).step == 1
    assert other.refused(other.optim_step()).reason == "GRADIENT_INCOMPLETE"


def test_weighted_logprobs_alone_if_asked(run: RawRun) -> None:
    example = datum([5, 6, 7, 8], [0, 1, 2])
    everything = run.send(run.forward(example))
    weighted = run.send(run.forward(example, logprob_scope=trainer_pb2.LOGPROB_SCOPE_WEIGHTED))

    assert floats(weighted.outputs[0].logprobs) == floats(everything.outputs[0].logprobs)[1:]
    assert weighted.metrics["loss:sum"] == everything.metrics["loss:sum"]

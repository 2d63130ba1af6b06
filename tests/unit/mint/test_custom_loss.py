"""Losses of the user's own: order, failures, what goes over the wire."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

import mint
from mint import types
from mint._transport.failures import Failure
from tests.unit.mint.faulty_server import Code, Fault, Server

LIMIT_S = 20.0
Data = list[types.Datum]
Logprobs = list[torch.Tensor]


def total(data: Data, logprobs: Logprobs) -> tuple[torch.Tensor, dict[str, float]]:
    """Of the fake server's logprobs, which are 0, 1, 2, ... in each datum."""
    loss = sum((logprob * (i + 1)).sum() for i, logprob in enumerate(logprobs))
    return loss, {"pair_accuracy": 0.75, "data": float(len(data))}  # type: ignore[return-value]


def weights(server: Server, sequence: int) -> list[list[float]]:
    found = [d.loss_fn_inputs["weights"] for d in server.script.requests[sequence].data]
    return [np.frombuffer(w.values, "<f4").reshape(tuple(w.shape)).tolist() for w in found]


def test_the_derivative_goes_back_as_weights(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    result = training.forward_backward_custom([*data, *data], total).result(LIMIT_S)
    training.optim_step().result(LIMIT_S)

    methods = [method for _, method in server.script.executed]
    assert methods == ["Forward", "ForwardBackward", "OptimStep"]
    assert weights(server, 2) == [[-1, -1], [-2, -2]]
    assert server.script.requests[2].WhichOneof("loss_fn") == "cross_entropy"
    assert server.script.requests[3].backward_count == 1
    assert result.loss_fn_outputs[1]["logprobs"].tolist() == [0, 1]
    assert result.loss_fn_output_type == "custom"


def test_metrics_pass_through_unchanged(training: mint.TrainingClient, data: Data) -> None:
    metrics = training.forward_backward_custom(data, total).result(LIMIT_S).metrics

    assert metrics["pair_accuracy"] == 0.75
    assert metrics["data"] == 1.0
    assert metrics["loss:sum"] == 1.0  # of logprobs 0 and 1
    assert metrics["surrogate_loss:sum"] == 2.0  # what the server says of its number 2
    assert metrics["tokens:sum"] == 2.0
    assert metrics["tokens_per_second:mean"] > 0


def test_a_metric_of_the_losss_own_wins(training: mint.TrainingClient, data: Data) -> None:
    def named(data: Data, logprobs: Logprobs) -> tuple[torch.Tensor, dict[str, float]]:
        return logprobs[0].sum(), {"loss:sum": 7.0, "tokens:sum": 8.0}

    metrics = training.forward_backward_custom(data, named).result(LIMIT_S).metrics

    assert (metrics["loss:sum"], metrics["tokens:sum"]) == (7.0, 8.0)


def test_metrics_that_require_grad_are_numbers_without_a_warning(
    training: mint.TrainingClient, data: Data
) -> None:
    def told(data: Data, logprobs: Logprobs) -> tuple[torch.Tensor, dict[str, Any]]:
        loss = logprobs[0].sum()
        return loss, {"own": loss * 2, "half": loss.bfloat16()}

    metrics = training.forward_backward_custom(data, told).result(LIMIT_S).metrics

    assert (metrics["own"], metrics["half"]) == (2.0, 1.0)


def test_targets_of_two_dimensions(server: Server, training: mint.TrainingClient) -> None:
    targets = [[1, 2, 3], [4, 5, 6]]
    wide = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": targets})

    training.forward_backward_custom([wide], total).result(LIMIT_S)

    assert weights(server, 2) == [[[-1, -1, -1], [-1, -1, -1]]]


def test_what_the_loss_alone_reads_is_not_sent(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    more = types.Datum(
        data[0].model_input, {**data[0].loss_fn_inputs, "reference": [0.5], "group": [3]}
    )
    seen: list[Any] = []

    def look(data: Data, logprobs: Logprobs) -> tuple[torch.Tensor, dict[str, float]]:
        seen.extend(data[0].loss_fn_inputs["group"].tolist())
        return logprobs[0].sum(), {}

    training.forward_backward_custom([more], look).result(LIMIT_S)

    assert seen == [3]
    assert set(server.script.requests[1].data[0].loss_fn_inputs) == {"target_tokens", "weights"}


def test_calls_made_after_it_take_effect_after_it(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    leave = threading.Event()

    def slow(data: Data, logprobs: Logprobs) -> tuple[torch.Tensor, dict[str, float]]:
        assert leave.wait(LIMIT_S)
        return logprobs[0].sum(), {}

    custom = training.forward_backward_custom(data, slow)
    step = training.optim_step()
    second = training.forward_backward_custom(data, total)
    last = training.forward(data)
    server.script.arrived(1)
    assert not step.done()
    leave.set()

    last.result(LIMIT_S)
    for call in (custom, step, second):
        call.result(LIMIT_S)
    assert [method for _, method in server.script.executed] == [
        *("Forward", "ForwardBackward", "OptimStep"),
        *("Forward", "ForwardBackward", "Forward"),
    ]


def test_a_loss_that_raises_fails_its_call_alone_and_its_step_is_short_of_one(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    def broken(data: Data, logprobs: Logprobs) -> tuple[torch.Tensor, dict[str, float]]:
        raise ZeroDivisionError("mine")

    before = training.forward_backward(data)
    custom = training.forward_backward_custom(data, broken)
    training.optim_step()
    after = training.forward_backward_custom(data, total)
    training.optim_step().result(LIMIT_S)

    with pytest.raises(ZeroDivisionError, match="mine"):
        custom.result(LIMIT_S)
    before.result(LIMIT_S)
    after.result(LIMIT_S)
    assert [method for _, method in server.script.executed] == [
        *("ForwardBackward", "Forward", "OptimStep"),
        *("Forward", "ForwardBackward", "OptimStep"),
    ]
    counts = {n: server.script.requests[n].backward_count for n in (3, 6)}
    assert counts == {3: 2, 6: 1}  # the server has seen one, and refuses the first step


def test_a_forward_that_fails_fails_the_call(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    server.script.faults = {(1, 1): Fault(Code.INVALID_ARGUMENT, "INVALID_REQUEST", executed=True)}

    custom = training.forward_backward_custom(data, total)
    training.forward(data).result(LIMIT_S)

    with pytest.raises(mint.BadRequestError):
        custom.result(LIMIT_S)


def bad(answer: Any) -> Any:
    return lambda data, logprobs: answer(logprobs) if callable(answer) else answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (3.0, "returned a float"),
        (lambda logprobs: logprobs[0].sum(), "returned a Tensor"),
        (lambda logprobs: (logprobs[0].sum(), None), "returned a tuple"),
        (lambda logprobs: (logprobs[0], {}), r"a loss of shape \[2\]"),
        (lambda logprobs: (1.0, {}), "a loss of 1.0"),
        (lambda logprobs: (logprobs[0].detach().sum(), {}), "does not depend on the logprobs"),
        (lambda logprobs: (logprobs[0].sum(), {"a": "b"}), "returned the metrics"),
        (lambda logprobs: (logprobs[0].log().sum(), {}), r"`data\[0\]` is inf at \[0\]"),
    ],
)
def test_bad_answers_of_a_loss(
    training: mint.TrainingClient, data: Data, answer: Any, words: str
) -> None:
    with pytest.raises(mint.InvalidInputError, match=words) as caught:
        training.forward_backward_custom(data, bad(answer)).result(LIMIT_S)

    assert caught.value.field == "loss_fn"
    training.forward(data).result(LIMIT_S)


def test_a_datum_that_the_loss_leaves_out_has_no_gradient(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    training.forward_backward_custom(
        [*data, *data], lambda data, logprobs: (logprobs[1].sum(), {})
    ).result(LIMIT_S)

    assert weights(server, 2) == [[0, 0], [-1, -1]]


def test_a_loss_that_calls_its_own_run_is_told_so(
    training: mint.TrainingClient, data: Data
) -> None:
    def nested(data: Data, logprobs: Logprobs) -> tuple[torch.Tensor, dict[str, float]]:
        training.forward(data).result(LIMIT_S)
        return logprobs[0].sum(), {}

    with pytest.raises(RuntimeError, match="cannot call the run"):
        training.forward_backward_custom(data, nested).result(LIMIT_S)
    training.forward(data).result(LIMIT_S)


def test_a_cut_batch_counts_its_backwards_before_the_loss_is_known(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    result = training.forward_backward_custom(data * 150, total)
    training.optim_step().result(LIMIT_S)

    assert len(result.result(LIMIT_S).loss_fn_outputs) == 150
    assert [method for _, method in server.script.executed] == [
        *("Forward", "Forward", "ForwardBackward", "ForwardBackward", "OptimStep")
    ]
    assert weights(server, 4)[-1] == [-150, -150]
    assert server.script.requests[5].backward_count == 2


@pytest.mark.parametrize("wrong", [[], "text", [object()]])
def test_bad_data_is_refused_at_once(training: mint.TrainingClient, wrong: Any) -> None:
    with pytest.raises(mint.InvalidInputError, match="data"):
        training.forward_backward_custom(wrong, total)


def test_data_without_targets_are_refused_at_once(training: mint.TrainingClient) -> None:
    bare = types.Datum(types.ModelInput.from_ints([1]), {"weights": [1.0]})

    with pytest.raises(mint.InvalidInputError, match="lacks `target_tokens`"):
        training.forward_backward_custom([bare], total)


def test_a_fenced_run_leaves_nobody_waiting(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    server.script.faults = {(1, 1): Fault(Code.ABORTED, "WRITER_FENCED")}

    custom = training.forward_backward_custom(data, total)
    step = training.optim_step()

    for call in (custom, step):
        with pytest.raises(mint.ConflictError):
            call.result(LIMIT_S)


def test_a_run_that_cannot_be_opened_again_leaves_nobody_waiting(
    training: mint.TrainingClient, data: Data
) -> None:
    reached, leave = threading.Event(), threading.Event()

    def slow(data: Data, logprobs: Logprobs) -> tuple[torch.Tensor, dict[str, float]]:
        reached.set()
        assert leave.wait(LIMIT_S)
        return logprobs[0].sum(), {}

    custom = training.forward_backward_custom(data, slow)
    step = training.optim_step()
    assert reached.wait(LIMIT_S)
    gone = Failure(Code.NOT_FOUND, "deleted", "TRAINING_RUN_NOT_FOUND")
    training._calls._opened(gone)
    leave.set()

    for call in (custom, step):
        with pytest.raises(mint.NotFoundError):
            call.result(LIMIT_S)


async def test_it_can_be_awaited_once_and_twice(training: mint.TrainingClient, data: Data) -> None:
    once = await training.forward_backward_custom(data, total)
    twice = await (await training.forward_backward_custom_async(data, total))

    assert once.metrics.keys() == twice.metrics.keys()

"""Numbers, order and resends of a run's calls, over a real channel."""

import asyncio
import random
import threading

import pytest

import mint
from mint import types
from tests.unit.mint.faulty_server import Code, Fault, Server, running

Data = list[types.Datum]
LIMIT_S = 20.0


def test_calls_take_effect_in_program_order(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    futures = [training.forward_backward(data) for _ in range(5)]
    step = training.optim_step()

    assert [future.result(LIMIT_S).metrics["loss:sum"] for future in futures] == [1, 2, 3, 4, 5]
    step.result(LIMIT_S)
    assert server.script.executed == [
        *((n, "ForwardBackward") for n in range(1, 6)),
        (6, "OptimStep"),
    ]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Code.UNAVAILABLE),
        Fault(Code.UNAVAILABLE, "ENGINE_STARTING"),
        Fault(Code.CANCELLED),
        Fault(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=0.01),
        Fault(Code.UNAVAILABLE, executed=True),
        Fault(Code.CANCELLED, executed=True),
    ],
)
def test_a_call_is_sent_again_and_acts_once(
    server: Server, training: mint.TrainingClient, data: Data, fault: Fault
) -> None:
    server.script.faults = {(1, 1): fault, (1, 2): fault, (2, 1): fault}

    first, second = training.forward_backward(data), training.forward_backward(data)

    assert second.result(LIMIT_S).metrics["loss:sum"] == 2
    assert first.result(LIMIT_S).metrics["loss:sum"] == 1
    assert server.script.executed == [(1, "ForwardBackward"), (2, "ForwardBackward")]
    assert [attempt.sequence for attempt in server.script.attempts].count(1) == 3


def test_a_bad_network_changes_neither_order_nor_outcomes(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    draw = random.Random(7)
    faults = [
        Fault(Code.UNAVAILABLE),
        Fault(Code.UNAVAILABLE, executed=True),
        Fault(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_s=0.02),
    ]
    server.script.faults = {
        (sequence, attempt): draw.choice(faults)
        for sequence in range(1, 201)
        for attempt in (1, 2)
        if draw.random() < 0.2
    }

    futures = [training.forward_backward(data) for _ in range(200)]
    metrics = [future.result(LIMIT_S).metrics["loss:sum"] for future in futures]

    assert metrics == [*range(1, 201)]
    assert [sequence for sequence, _ in server.script.executed] == [*range(1, 201)]


def test_an_early_call_waits_for_the_one_before_it(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    gate = server.script.gates[1] = threading.Event()
    server.script.faults = {(2, 1): Fault(Code.ABORTED, "SEQUENCE_GAP")}

    training.forward_backward(data)
    second = training.forward_backward(data)
    server.script.wait_until(lambda: (2, "ForwardBackward") in server.script.executed)
    gate.set()

    second.result(LIMIT_S)


def test_an_attempt_that_takes_too_long_is_attached_to_the_same_call(data: Data) -> None:
    with running() as server, mint.ServiceClient(base_url=server.address) as service:
        training = service.create_lora_training_client()
        connection = service._servers.trainer
        object.__setattr__(connection.settings, "attempt_s", 0.2)
        gate = server.script.gates[1] = threading.Event()
        call = training.forward_backward(data)
        server.script.arrived(3)
        gate.set()

        assert call.result(LIMIT_S).metrics["loss:sum"] == 1
        assert server.script.executed == [(1, "ForwardBackward")]


def test_only_so_many_calls_are_on_the_wire(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    gate = server.script.gates[1] = threading.Event()
    for number in range(2, 9):
        server.script.gates[number] = threading.Event()
    futures = [training.forward_backward(data) for _ in range(20)]
    server.script.arrived(8)  # as many as the server allows

    assert {attempt.sequence for attempt in server.script.attempts} == set(range(1, 9))
    gate.set()
    server.script.arrived(9)
    assert [attempt.sequence for attempt in server.script.attempts][8:] == [9]
    for held in server.script.gates.values():
        held.set()
    assert [future.result(LIMIT_S).metrics["loss:sum"] for future in futures] == [*range(1, 21)]


def test_acknowledgements_are_cumulative(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    gate = server.script.gates[1] = threading.Event()
    first = training.forward_backward(data)
    training.forward_backward(data).result(LIMIT_S)
    training.forward_backward(data).result(LIMIT_S)
    gate.set()
    first.result(LIMIT_S)
    training.optim_step().result(LIMIT_S)

    acknowledged = {call.sequence: call.acknowledged_sequence for call in server.script.attempts}
    assert acknowledged == {1: 0, 2: 0, 3: 0, 4: 3}


def test_a_recorded_error_fails_its_call_alone(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    server.script.faults = {(1, 1): Fault(Code.INVALID_ARGUMENT, "INVALID_REQUEST", executed=True)}

    bad, good = training.forward_backward(data), training.forward_backward(data)

    with pytest.raises(mint.BadRequestError):
        bad.result(LIMIT_S)
    assert good.result(LIMIT_S).metrics["loss:sum"] == 2
    assert server.script.opened == 0


def test_a_fenced_client_stays_fenced(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    server.script.faults = {(1, 1): Fault(Code.ABORTED, "WRITER_FENCED")}
    first = training.forward_backward(data)

    with pytest.raises(mint.ConflictError) as caught:
        first.result(LIMIT_S)
    assert caught.value.reason == "WRITER_FENCED"
    with pytest.raises(mint.ConflictError):
        training.forward_backward(data).result(LIMIT_S)
    assert server.script.opened == 0


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(Code.UNAUTHENTICATED, "UNAUTHENTICATED"), mint.AuthenticationError),
        (Fault(Code.INVALID_ARGUMENT, "INVALID_REQUEST"), mint.BadRequestError),  # not recorded
        (Fault(Code.RESOURCE_EXHAUSTED), mint.RateLimitError),  # gRPC's own: too large
        (Fault(Code.UNKNOWN), mint.RequestFailedError),
    ],
)
def test_after_a_call_that_used_no_number_the_run_is_opened_again(
    server: Server,
    training: mint.TrainingClient,
    data: Data,
    fault: Fault,
    error: type[mint.MintError],
) -> None:
    server.script.faults = {(2, 1): fault}
    training.forward_backward(data).result(LIMIT_S)

    with pytest.raises(error):
        training.forward_backward(data).result(LIMIT_S)
    training.forward_backward(data).result(LIMIT_S)

    assert server.script.opened == 1
    assert [attempt.writer_epoch for attempt in server.script.attempts] == [1, 1, 2]
    assert [sequence for sequence, _ in server.script.executed] == [1, 2]


def test_a_plain_call_that_raises_at_once_costs_nothing(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    training.forward_backward(data)
    with pytest.raises(mint.BadRequestError, match="cross_entropy, importance_sampling"):
        training.forward_backward(data, loss_fn="grpo")
    training.forward_backward(data)
    training.optim_step().result(LIMIT_S)
    training.forward_backward(data)
    training.optim_step().result(LIMIT_S)

    assert [sequence for sequence, _ in server.script.executed] == [1, 2, 3, 4, 5]
    assert server.script.requests[3].backward_count == 2
    assert server.script.requests[5].backward_count == 1


@pytest.mark.parametrize("custom", [False, True])
async def test_a_refusal_that_a_gather_swallows_counts_and_the_step_says_which_call_it_was(
    server: Server, training: mint.TrainingClient, data: Data, custom: bool
) -> None:
    mismatch = Fault(Code.FAILED_PRECONDITION, "BACKWARD_COUNT_MISMATCH", executed=True)
    server.script.faults = {(2, 1): mismatch}
    bad = (
        training.forward_backward_custom_async(data, None)  # type: ignore[arg-type]
        if custom
        else training.forward_backward_async(data, loss_fn="grpo")
    )
    await asyncio.gather(training.forward_backward_async(data), bad, return_exceptions=True)
    with pytest.raises(mint.BadRequestError) as caught:
        await training.optim_step()

    assert server.script.requests[2].backward_count == 2
    assert caught.value.reason == "BACKWARD_COUNT_MISMATCH"
    words = str(caught.value)
    assert words.startswith("call 2 of forward_backward failed (`loss_fn` is ")
    assert "make all of the batch's again" in words


def test_a_step_says_which_of_its_calls_the_server_refused(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    bad = Fault(Code.INVALID_ARGUMENT, "INVALID_REQUEST", "`data[0]` is odd", executed=True)
    incomplete = Fault(Code.FAILED_PRECONDITION, "GRADIENT_INCOMPLETE", executed=True)
    server.script.faults = {(1, 1): bad, (2, 1): incomplete}
    backward = training.forward_backward(data)
    backward.exception(LIMIT_S)

    with pytest.raises(mint.BadRequestError, match=r"call 1 of .* failed \(`data\[0\]` is odd\)"):
        training.optim_step().result(LIMIT_S)


def test_backwards_count_again_if_what_clears_them_fails(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    server.script.faults = {(2, 1): Fault(Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND", executed=True)}
    training.forward_backward(data)
    with pytest.raises(mint.NotFoundError):
        training.load_state("mint://nothing/weights/here").result(LIMIT_S)
    training.forward_backward(data)
    training.optim_step().result(LIMIT_S)
    training.forward_backward(data)
    training.discard_gradient().result(LIMIT_S)
    training.forward_backward(data)
    training.optim_step().result(LIMIT_S)

    assert server.script.requests[4].backward_count == 2
    assert server.script.requests[8].backward_count == 1


def test_a_message_that_is_too_large_is_refused_before_it_has_a_number(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    long = types.Datum(types.ModelInput.from_ints([1]), {"weights": [0.5] * 300_000})

    with pytest.raises(mint.BadRequestError, match="1048576") as caught:
        training.forward_backward([long])
    training.forward(data).result(LIMIT_S)

    assert caught.value.field == "data[0]"
    assert server.script.executed == [(1, "Forward")]


def test_calls_survive_a_server_that_restarts(data: Data) -> None:
    with running() as server:
        service = mint.ServiceClient(base_url=server.address)
        training = service.create_lora_training_client()
        gate = server.script.gates[1] = threading.Event()
        call = training.forward_backward(data)
        server.script.arrived(1)
        server.grpc_server.stop(0).wait(LIMIT_S)
        gate.set()
    with running(address=server.address) as again, service:
        assert call.result(LIMIT_S).metrics["loss:sum"] == 1
        assert again.script.executed == [(1, "ForwardBackward")]


def test_calls_without_an_answer_fail_when_the_client_closes(
    server: Server, service: mint.ServiceClient, training: mint.TrainingClient, data: Data
) -> None:
    server.script.gates[1] = threading.Event()
    call = training.forward_backward(data)
    server.script.arrived(1)
    service.close()

    with pytest.raises(mint.APIConnectionError, match="closed"):
        call.result(LIMIT_S)
    with pytest.raises(mint.APIConnectionError, match="closed"):
        training.forward_backward(data).result(LIMIT_S)

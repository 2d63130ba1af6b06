"""An engine outlives what the arithmetic of one call raises, and so do the rows beside it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from mint_core.model.faults import ends_the_engine
from tests.engines.mortal import ODD, ODD_RATE
from tests.resending import ADAM, start_run, stub_of
from tests.supervised import Supervised, supervised
from tests.trainer_rpc import CALL_LIMIT_S, RawRun, datum


@pytest.fixture(scope="module")
def service(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    flags = {"base_model": qwen3_folder, "device": "cpu", "threads": 1}
    folder = tmp_path_factory.mktemp("odd")
    with supervised("tests.engines.mortal_service", folder, (), **flags) as running:
        yield running


def pending(run: RawRun) -> RawRun:
    """With a step behind it and a gradient before it."""
    run.send(run.forward_backward(datum([9, 10, 11, 12])))
    run.send(run.optim_step(adam_params=ADAM))
    run.send(run.forward_backward(datum([20, 21, 22, 23])))
    return run


def test_what_a_pass_raises_is_one_calls_error_and_its_neighbours_are_to_the_bit_as_alone(
    service: Supervised,
) -> None:
    """Though the pass has added to all of their gradients before it raised."""
    with stub_of(service) as stub:
        neighbour, twin, odd = (pending(start_run(stub)) for _ in range(3))
        first = start_run(stub)
        (engine,) = service.engines()
        service.kill_engine(signal.SIGSTOP)
        under_way = first.start(first.forward())  # the others wait, and then go in one pass
        first.wait_until_accepted(1)
        calls = [
            neighbour.start(neighbour.forward_backward()),
            odd.start(odd.forward_backward(datum([*ODD, 5, 6]))),
            odd.start(odd.optim_step()),
            neighbour.start(neighbour.optim_step(adam_params=ADAM)),
        ]
        neighbour.wait_until_accepted(5)
        odd.wait_until_accepted(5)
        service.kill_engine(signal.SIGCONT)

        for call, code, reason in (
            (calls[1], grpc.StatusCode.INTERNAL, "ENGINE_FAULT"),
            (calls[2], grpc.StatusCode.FAILED_PRECONDITION, "GRADIENT_INCOMPLETE"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call.result(CALL_LIMIT_S)
            assert caught.value.code() is code
            assert reason in str(caught.value.trailing_metadata())
        answers = [calls[0].result(CALL_LIMIT_S), calls[3].result(CALL_LIMIT_S)]
        twins = [twin.forward_backward(), twin.optim_step(adam_params=ADAM)]
        for answer, expected in zip(answers, map(twin.send, twins), strict=True):
            answer.metrics.pop("tokens_per_second:mean", None)
            expected.metrics.pop("tokens_per_second:mean", None)
            assert answer == expected
        assert neighbour.send(neighbour.forward()).outputs == twin.send(twin.forward()).outputs
        assert odd.describe().step == 1
        odd.send(odd.forward_backward())
        odd.send(odd.optim_step(adam_params=ADAM))
        under_way.result(CALL_LIMIT_S)
        assert service.engines() == [engine]
        assert f"run={neighbour.id} restored" in service.log_text()
        assert neighbour.describe().inexact_replay_count == 0


def test_what_steps_raise_is_one_steps_error_and_its_row_is_as_before(service: Supervised) -> None:
    """Though all of the steps were taken before it was raised."""
    with stub_of(service) as stub:
        neighbour, twin, odd, unmoved = (pending(start_run(stub)) for _ in range(4))
        first = start_run(stub)
        (engine,) = service.engines()
        service.kill_engine(signal.SIGSTOP)
        under_way = first.start(first.forward())
        first.wait_until_accepted(1)
        calls = [
            odd.start(odd.optim_step(adam_params={"learning_rate": ODD_RATE})),
            neighbour.start(neighbour.optim_step(adam_params=ADAM)),
        ]
        neighbour.wait_until_accepted(4)
        odd.wait_until_accepted(4)
        service.kill_engine(signal.SIGCONT)

        with pytest.raises(grpc.RpcError) as caught:
            calls[0].result(CALL_LIMIT_S)
        assert "ENGINE_FAULT" in str(caught.value.trailing_metadata())
        step = twin.send(twin.optim_step(adam_params=ADAM))
        assert calls[1].result(CALL_LIMIT_S) == step
        under_way.result(CALL_LIMIT_S)
        assert f"run={neighbour.id} restored" in service.log_text()
        assert odd.describe().step == 1
        assert odd.refused(odd.optim_step()).reason == "NO_GRADIENT"
        unmoved.send(unmoved.discard())
        for run in (odd, unmoved):
            run.send(run.forward_backward())
        steps = [run.send(run.optim_step(adam_params=ADAM)) for run in (odd, unmoved)]
        assert steps[0] == steps[1]
        assert odd.send(odd.forward()).outputs == unmoved.send(unmoved.forward()).outputs
        assert service.engines() == [engine]


def test_a_pass_of_one_call_that_raises_fails_at_once(service: Supervised) -> None:
    with stub_of(service) as stub:
        run, twin = (pending(start_run(stub)) for _ in range(2))
        before = service.log_text().count("call failed in the engine")
        for backward in (run.forward_backward, run.forward):
            error = run.refused(backward(datum([*ODD, 5, 6])))
            assert (error.reason, error.metadata) == ("ENGINE_FAULT", {})
            assert "ZeroDivisionError" in error.message
        assert service.log_text().count("call failed in the engine") == before + 2
        assert run.send(run.discard()).gradient_discarded
        twin.send(twin.discard())
        assert run.send(run.forward()).outputs == twin.send(twin.forward()).outputs


@pytest.mark.parametrize("raised", [ZeroDivisionError(), KeyError("a"), AssertionError("b")])
def test_errors_of_arithmetic_end_no_engine(raised: Exception) -> None:
    assert not ends_the_engine(raised)


def test_torchs_own_errors_end_an_engine_where_memory_was_short() -> None:
    with pytest.raises(RuntimeError) as short:
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError) as narrow:
        torch.ones(2).clamp(0.0, 1e39)
    assert ends_the_engine(short.value)
    assert not ends_the_engine(narrow.value)
    assert ends_the_engine(MemoryError())
    assert ends_the_engine(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))

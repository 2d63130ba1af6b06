"""Faults of the client's own, on threads where nobody hears of them: calls fail and say so."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import mint
from mint import types
from mint._threads import sender, timer
from mint.futures import on_thread
from tests.unit.mint.faulty_server import Code, Fault, Server

Data = list[types.Datum]
LIMIT_S = 20.0
BUG = ZeroDivisionError("a bug")


def breaking(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, but for one of its calls, which raises."""
    calls = iter(range(1, sys.maxsize))

    def broken(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise BUG
        return function(*arguments, **options)

    return broken


def patch(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    owner, _, attribute = name.rpartition(".")
    parts = owner.split(":")
    target: Any = sys.modules[f"mint.{parts[0]}"]
    for part in parts[1:]:
        target = getattr(target, part)
    monkeypatch.setattr(target, attribute, breaking(getattr(target, attribute), at))


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [str(record.exc_info[1]) for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("_transport.call:Call._send", 2),  # on the thread that sends again
        ("_transport.call:Call._attempt", 1),  # on one that makes blocking calls
        ("_transport.call.failure_of", 1),
        ("_transport.silence._is_silence", 1),
        ("_run.run_calls:RunCalls.acknowledge", 1),  # on the thread that sends
        ("_run.run_calls:RunCalls.acknowledge", 2),
        ("_run.run_calls:RunCalls.ended", 1),
    ],
)
def test_a_call_that_breaks_off_fails_and_the_next_is_sent_again(
    server: Server,
    training: mint.TrainingClient,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    at: int,
) -> None:
    server.script.faults = {(1, 1): Fault(Code.UNAVAILABLE), (1, 2): Fault(Code.UNAVAILABLE)}
    patch(monkeypatch, name, at)

    with pytest.raises(mint.RequestFailedError, match=r"client's own.*a bug"):
        training.forward_backward(data).result(LIMIT_S)

    assert logged(caplog) == ["a bug"]
    training.forward_backward(data).result(LIMIT_S)


@pytest.mark.parametrize("name", ["_post", "_attempt_ended", "_send"])
def test_a_sample_that_breaks_off_fails(
    server: Server, sampling: mint.SamplingClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    server.sampler.fail_first = Fault(Code.UNAVAILABLE)
    patch(monkeypatch, f"_transport.call:Call.{name}", 2 if name == "_send" else 1)
    prompt = types.ModelInput.from_ints([1])

    with pytest.raises(mint.RequestFailedError, match="a bug"):
        sampling.sample(prompt).result(LIMIT_S)
    sampling.sample(prompt).result(LIMIT_S)


def test_a_run_that_cannot_be_opened_again_fails_what_waits_and_tries_anew(
    server: Server,
    training: mint.TrainingClient,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.script.faults = {(1, 1): Fault(Code.UNAUTHENTICATED, "UNAUTHENTICATED")}
    patch(monkeypatch, "_run.run_calls.open_run", 1)
    with pytest.raises(mint.AuthenticationError):
        training.forward_backward(data).result(LIMIT_S)

    with pytest.raises(mint.RequestFailedError, match="a bug"):
        training.forward_backward(data).result(LIMIT_S)

    assert logged(caplog) == ["a bug"]
    training.forward_backward(data).result(LIMIT_S)
    assert server.script.opened == 1


@pytest.mark.parametrize("error", [BUG, SystemExit(1)], ids=repr)
@pytest.mark.parametrize(
    "run", [lambda function: timer.call_later(0.0, function), sender.run], ids=["timer", "sender"]
)
def test_a_thread_outlives_what_it_runs(
    run: Callable[[Callable[[], None]], None],
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> None:
        raise error

    later = threading.Event()
    run(broken)
    run(later.set)

    assert later.wait(LIMIT_S)
    assert logged(caplog) == [str(error)]


def test_a_callback_that_ends_its_thread_holds_no_call_up(
    server: Server, training: mint.TrainingClient, data: Data
) -> None:
    server.script.gates[1] = threading.Event()
    calls = [training.forward(data) for _ in range(12)]  # more than there are threads
    for call in calls:
        call.add_done_callback(lambda _: sys.exit(1))
    server.script.gates[1].set()

    for call in calls:
        call.result(LIMIT_S)
    training.forward(data).result(LIMIT_S)


def test_a_custom_loss_for_which_there_is_no_thread_holds_no_call_up(
    training: mint.TrainingClient, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint._run.custom_loss.on_thread", breaking(on_thread, 1))

    custom = training.forward_backward_custom(data, lambda data, logprobs: (logprobs[0].sum(), {}))
    after = training.forward(data)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        custom.result(LIMIT_S)
    after.result(LIMIT_S)

"""A script that waits for long is told for what."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

import mint
from mint import types
from tests.unit.mint.faulty_server import Code, Fault, Server

LIMIT_S = 20.0
PROMPT = types.ModelInput.from_ints([1, 2])
HELD = types.SamplingParams(max_tokens=13)  # the server does not answer it


class Lines(logging.Handler):
    """The first line that says for what is waited."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ""
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("waiting for") and not self.came.is_set():
            self.first = record.getMessage()
            self.came.set()


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    monkeypatch.setattr("mint._transport.waits._FIRST_S", 0.1)
    monkeypatch.setattr("mint._transport.waits._LOOK_S", 0.02)
    handler = Lines()
    logging.getLogger("mint").addHandler(handler)
    yield handler
    logging.getLogger("mint").removeHandler(handler)


def read_on(sampling: mint.SamplingClient) -> threading.Thread:
    """Reads a stream that stays open."""

    def read() -> None:
        with suppress(mint.MintError):  # when the test ends
            list(sampling.sample_stream(PROMPT))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return reader


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda s: s.sample(PROMPT, 1, HELD), "Sample:"),
        (lambda s: [s.sample(PROMPT, 1, HELD), s.sample(PROMPT, 1, HELD)], "Sample and 1 more:"),
        (read_on, "StreamSample:"),
    ],
)
def test_samples_that_are_waited_for_are_named(
    server: Server,
    sampling: mint.SamplingClient,
    lines: Lines,
    make: Callable[[Any], object],
    what: str,
) -> None:
    kept = make(sampling)

    assert lines.came.wait(LIMIT_S), kept
    assert lines.first.startswith(f"waiting for {what}")
    assert f"no answer from {server.address}" in lines.first
    assert "has not answered yet" in lines.first
    server.sampler.cancelled.set()


def test_a_training_call_that_is_waited_for_is_named(
    server: Server, training: mint.TrainingClient, data: list[types.Datum], lines: Lines
) -> None:
    server.script.gates[1] = threading.Event()
    training.forward_backward(data)

    assert lines.came.wait(LIMIT_S)
    assert lines.first.startswith("waiting for ForwardBackward:")


def test_what_the_server_said_of_a_wait_is_passed_on(
    server: Server, sampling: mint.SamplingClient, lines: Lines
) -> None:
    server.sampler.fail_first = Fault(
        Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full", retry_after_s=2.0
    )
    sampling.sample(PROMPT).result(LIMIT_S)

    assert lines.first.endswith("(the queue is full)")


def test_a_watch_of_a_run_may_be_silent_for_as_long_as_it_likes(
    server: Server, training: mint.TrainingClient, lines: Lines
) -> None:
    with training.watch() as watch:
        next(watch)
        waiting = threading.Thread(target=list, args=(watch,))
        waiting.start()
        server.script.gates[1] = threading.Event()
        training.discard_gradient()  # it alone is waited for

        assert lines.came.wait(LIMIT_S)
        assert lines.first.startswith("waiting for DiscardGradient:")
    waiting.join(LIMIT_S)

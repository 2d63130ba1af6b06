"""Ctrl-C while a call is being made, and a fork: later calls go on."""

import gc
import os
import random
import signal
import time
from collections.abc import Callable
from types import FrameType

import pytest

import mint
from mint import types

TRIALS = 300
LIMIT_S = 20.0
LONGEST_S = 3e-4  # of the wait for the interrupt; about as long as making the call takes


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def forward(training: mint.TrainingClient, data: list[types.Datum]) -> None:
    training.forward(data)


def custom(training: mint.TrainingClient, data: list[types.Datum]) -> None:
    training.forward_backward_custom(data, lambda data, logprobs: (logprobs[0].sum(), {}))


@pytest.mark.parametrize("call", [forward, custom])
def test_interrupted_calls_hold_no_later_one_up(
    training: mint.TrainingClient,
    data: list[types.Datum],
    call: Callable[[mint.TrainingClient, list[types.Datum]], None],
) -> None:
    call(training, data)
    training.forward(data).result(LIMIT_S)
    delays = random.Random(0)
    interrupted = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # an interrupt inside of a collection is lost, and pytest finds it
    try:
        for _ in range(TRIALS):
            try:
                signal.setitimer(signal.ITIMER_REAL, delays.uniform(1e-6, LONGEST_S))
                call(training, data)
                time.sleep(LONGEST_S)  # the signal comes here at the latest
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            training.forward(data).result(LIMIT_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert interrupted > TRIALS / 2


def test_a_fork_leaves_the_parents_client_usable(
    training: mint.TrainingClient, data: list[types.Datum]
) -> None:
    training.forward(data).result(LIMIT_S)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    training.forward(data).result(LIMIT_S)

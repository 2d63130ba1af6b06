"""Ctrl-C while calls are made, waited for and read, and a fork: later calls go on."""

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
from mintrpc.v1 import sampler_pb2
from tests.unit.mint.faulty_server import Server

TRIALS = 300
LIMIT_S = 20.0
PROMPT, SEEDED = types.ModelInput.from_ints([1]), types.SamplingParams(max_tokens=4, seed=7)
LONGEST_S = 3e-4  # of the wait for the interrupt; about as long as making the call takes
LONGEST_ANSWERED_S = 4e-3  # the same, until the answers have been read


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def forward(training: mint.TrainingClient, data: list[types.Datum]) -> None:
    training.forward(data)


def custom(training: mint.TrainingClient, data: list[types.Datum]) -> None:
    training.forward_backward_custom(data, lambda data, logprobs: (logprobs[0].sum(), {}))


def interrupt_often(
    call: Callable[[], object], check: Callable[[], object], longest_s: float
) -> None:
    """Makes the call again and again, interrupted at any moment, and checks each time."""
    call()
    check()
    delays = random.Random(0)
    interrupted = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # an interrupt inside of a collection is lost, and pytest finds it
    try:
        for _ in range(TRIALS):
            try:
                signal.setitimer(signal.ITIMER_REAL, delays.uniform(1e-6, longest_s))
                call()
                time.sleep(longest_s)  # the signal comes here at the latest
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert interrupted > TRIALS / 2


@pytest.mark.parametrize("call", [forward, custom])
def test_interrupted_calls_hold_no_later_one_up(
    training: mint.TrainingClient,
    data: list[types.Datum],
    call: Callable[[mint.TrainingClient, list[types.Datum]], None],
) -> None:
    interrupt_often(
        lambda: call(training, data), lambda: training.forward(data).result(LIMIT_S), LONGEST_S
    )


def sample(sampling: mint.SamplingClient) -> None:
    for future in [sampling.sample(PROMPT, 1, SEEDED) for _ in range(8)]:
        future.result(LIMIT_S)


def read(sampling: mint.SamplingClient) -> None:
    for _ in sampling.sample_stream(PROMPT, 1, SEEDED):
        pass


# An interrupt inside of a finalizer, such as gRPC's of a call, is lost.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", [sample, read])
def test_an_interrupt_leaves_no_lock_of_the_channel_held(
    server: Server,
    sampling: mint.SamplingClient,
    call: Callable[[mint.SamplingClient], None],
) -> None:
    parts = [
        sampler_pb2.StreamSampleResponse(tokens=[token], logprobs=[-1.0], model_logprobs=[-1.0])
        for token in range(4)
    ]
    parts[-1].stop_reason = sampler_pb2.STOP_REASON_STOP
    server.sampler.streams = [(parts, None)] * (TRIALS + 1)
    interrupt_often(
        lambda: call(sampling),
        lambda: sampling.sample(PROMPT, 1, SEEDED).result(LIMIT_S),
        LONGEST_ANSWERED_S,
    )


def test_a_fork_leaves_the_parents_client_usable(
    training: mint.TrainingClient, data: list[types.Datum]
) -> None:
    training.forward(data).result(LIMIT_S)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    training.forward(data).result(LIMIT_S)

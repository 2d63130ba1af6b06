"""Training calls to a server that comes and goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from mintrpc.v1 import trainer_pb2_grpc
from tests.servers import RunningService
from tests.supervised import LIMIT_S, Supervised
from tests.trainer_rpc import RawRun, create, datum

ADAM = {"learning_rate": 0.01}
EAGER = (  # to connect again
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # for an attempt
    ("grpc.max_reconnect_backoff_ms", 200),
)
AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@contextmanager
def stub_of(service: Supervised | RunningService) -> Iterator[trainer_pb2_grpc.TrainerServiceStub]:
    """Waits for the server, also while it is away: each call has `wait_for_ready`."""
    with grpc.insecure_channel(service.address, EAGER) as channel:
        grpc.channel_ready_future(channel).result(LIMIT_S)
        yield trainer_pb2_grpc.TrainerServiceStub(channel)


def start_run(stub: trainer_pb2_grpc.TrainerServiceStub, **options: Any) -> RawRun:
    """A run, once the engine is up."""
    return insisting(lambda: create(stub, **options))


def insisting(call: Any) -> Any:
    """Makes a call until the server is there and has room, as clients do."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() not in AGAIN or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def resend(run: RawRun, request: Any) -> Any:
    """Sends a request until there is an answer."""
    return insisting(lambda: run.send(request))


def train(run: RawRun, steps: int) -> list[Any]:
    return [
        answer
        for step in range(steps)
        for answer in (
            run.send(run.forward_backward(datum([20 + step, 21, 22, 23]))),
            run.send(run.optim_step(adam_params=ADAM)),
        )
    ]

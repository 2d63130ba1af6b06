"""How a sampler ends when it is told to: health first, then intake, and in time."""

import signal
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mintrpc.v1 import sampler_pb2_grpc
from tests.samplers import DEADLINE_S, connected, sample_request, tokens_of
from tests.servers import running_sampler
from tests.warm import children

DRAIN_LIMIT_S = 15.0
# Done in a fraction of the 5 s that calls under way are given, also on a busy machine; the others
# would take minutes.
LONG = {"max_tokens": 200}
ENDLESS = {"max_tokens": 4000}
FLAGS = {"base_model_name": "tiny", "max_running_samples": 4}
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_it_says_so_refuses_more_ends_what_it_can_and_exits(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    with (
        running_sampler(qwen3_folder, tmp_path, **FLAGS) as service,
        connected(service, tmp_path) as sampler,
        grpc.insecure_channel(service.address) as channel,
    ):
        expected = tokens_of(sampler.sample(params=LONG))
        health = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=DEADLINE_S
        )
        assert next(health).status != NOT_SERVING
        running = sampler.stub.Sample.future(sample_request(params=LONG), timeout=DEADLINE_S)
        endless = sampler.stub.Sample.future(
            sample_request(num_samples=100, params=ENDLESS), timeout=DEADLINE_S
        )
        await_work(service.process.pid)
        started_s = time.monotonic()

        service.process.send_signal(signal.SIGTERM)

        assert next(health).status == NOT_SERVING
        assert not running.done() or running.code() is grpc.StatusCode.OK
        with grpc.insecure_channel(service.address) as late:
            stub = sampler_pb2_grpc.SamplerServiceStub(late)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Sample(sample_request(), timeout=DEADLINE_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert tokens_of(running.result()) == expected
        assert endless.exception() is not None
        assert endless.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert service.process.wait(DRAIN_LIMIT_S) == 0
        assert time.monotonic() - started_s < DRAIN_LIMIT_S


def await_work(front: int) -> None:
    """Waits until a service's engine computes."""
    (engine,) = children(front)
    started_s = engine.cpu_times().user
    deadline = time.monotonic() + DEADLINE_S
    while engine.cpu_times().user < started_s + 0.1:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # nothing tells of an engine's work

"""How many small calls does one trainer's front serve, and what does each cost it, as groups become
more? The service is the real one; its engines are processes of their own at the same pipe, with
sums in the place of a model (`tests/engines/rows.py`), and so answer at once.

`python -m benchmarks.front_limit [--seconds 20] [--users 64] [--groups 1 2 4 8 16]`

The front has one core to itself; load and engines share another. Each user keeps three calls with
the front: a ForwardBackward of 4 tokens, the OptimStep behind it, and GetServerCapabilities. The
journal is on; there are neither keys nor TLS. `calls_per_front_cpu_s` is what the front could serve
if the other core kept it busy all the time.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import psutil

from mintrpc.v1 import model_pb2, model_pb2_grpc, trainer_pb2_grpc
from tests.servers import RunningService, running_summing_trainer
from tests.trainer_rpc import RawRun, create_request, datum, lora_config
from tests.warm import children

FRONT_CORE, LOAD_CORE = 1, 0
MAX_BATCH_TOKENS, WARM_UP_S = 4096, 3.0
DATUM = datum([20, 21, 22, 23, 24])
KINDS = FORWARD_BACKWARD, OPTIM_STEP, CAPABILITIES = (
    "ForwardBackward",
    "OptimStep",
    "GetServerCapabilities",
)


@dataclass
class Answers:
    """What has been answered since `begin`: seconds of each call, by kind."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def begin(self) -> None:
        self.seconds = {kind: [] for kind in KINDS}

    async def timed(self, kind: str, call: Awaitable[object]) -> None:
        started = time.perf_counter()
        await call
        self.seconds[kind].append(time.perf_counter() - started)


def pin(pid: int, core: int) -> None:
    """With all its threads; those that they start stay with them."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, {core})


def cpu_s(*pids: int) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


async def use(channel: grpc.aio.Channel, seed: int, answers: Answers) -> None:
    """Takes steps until cancelled."""
    trainer = trainer_pb2_grpc.TrainerServiceStub(channel)
    model = model_pb2_grpc.ModelServiceStub(channel)
    made = await trainer.CreateTrainingRun(create_request(lora_config=lora_config(seed=seed)))
    run = RawRun(trainer, made.training_run, made.writer_epoch)
    while True:
        known = {"acknowledged_sequence": run.next_sequence - 1}
        await asyncio.gather(
            answers.timed(
                FORWARD_BACKWARD, trainer.ForwardBackward(run.forward_backward(DATUM, **known))
            ),
            answers.timed(OPTIM_STEP, trainer.OptimStep(run.optim_step(**known))),
            answers.timed(
                CAPABILITIES, model.GetServerCapabilities(model_pb2.GetServerCapabilitiesRequest())
            ),
        )


async def measure(service: RunningService, users: int, seconds: float) -> dict[str, object]:
    front, answers = service.process.pid, Answers()
    engines = [child.pid for child in children(front)]
    pin(front, FRONT_CORE)
    for pid in (*engines, os.getpid()):
        pin(pid, LOAD_CORE)
    answers.begin()
    async with grpc.aio.insecure_channel(service.address) as channel:
        tasks = [asyncio.create_task(use(channel, seed, answers)) for seed in range(users)]
        await asyncio.sleep(WARM_UP_S)
        answers.begin()
        before = time.monotonic(), cpu_s(front), cpu_s(*engines, os.getpid())
        await asyncio.sleep(seconds)
        after = time.monotonic(), cpu_s(front), cpu_s(*engines, os.getpid())
        calls = sum(len(each) for each in answers.seconds.values())
        for task in tasks:
            assert not task.done(), task.exception()
            task.cancel()
        await asyncio.wait(tasks)
    wall_s, front_s, load_s = (b - a for a, b in zip(before, after, strict=True))
    return {
        "calls_per_s": round(calls / wall_s),
        "front_cpu_ms_per_call": round(1e3 * front_s / calls, 3),
        "calls_per_front_cpu_s": round(calls / front_s),
        "front_core_share": round(front_s / wall_s, 3),
        "load_core_share": round(load_s / wall_s, 3),
        "ms_p50_and_p99": {
            kind: [round(1e3 * float(q), 1) for q in np.quantile(each, (0.5, 0.99))]
            for kind, each in answers.seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    for groups in options.groups:
        flags = {"groups": groups, "max_batch_tokens": MAX_BATCH_TOKENS}
        with (
            tempfile.TemporaryDirectory() as folder,
            running_summing_trainer(Path(folder), **flags) as service,
        ):
            row = asyncio.run(measure(service, options.users, options.seconds))
        sys.stdout.write(json.dumps({"groups": groups, "users": options.users, **row}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

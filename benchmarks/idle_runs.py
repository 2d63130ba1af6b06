"""What does a step cost the trainer's front beside runs that are idle? CPU time of its process."""

import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

import mint
from mint import types
from tests.supervised import summing

STEPS, ROUNDS = 50, 8
DATA = [
    types.Datum(
        types.ModelInput.from_ints([1, 2, 3]),
        {"target_tokens": np.array([1, 2, 3]), "weights": np.ones(3, np.float32)},
    )
]


def step(client: mint.TrainingClient) -> None:
    computed = client.forward_backward(DATA)
    client.optim_step(types.AdamParams(learning_rate=0.1)).result()
    computed.result()


def step_ms(client: mint.TrainingClient, front: psutil.Process) -> float:
    """The front's CPU time of a step, as the median of rounds."""
    rounds = []
    for _ in range(ROUNDS):
        before = front.cpu_times()
        for _ in range(STEPS):
            step(client)
        after = front.cpu_times()
        seconds = after.user + after.system - before.user - before.system
        rounds.append(1e3 * seconds / STEPS)
    return statistics.median(rounds)


def main() -> None:
    idle = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    with tempfile.TemporaryDirectory() as name, summing(Path(name)) as service:
        service.await_start(1)
        with mint.ServiceClient(base_url=service.address) as client:
            one = client.create_lora_training_client(rank=1, seed=0)
            front = psutil.Process(service.pid)
            step_ms(one, front)  # warms up
            print(f"alone: {step_ms(one, front):.2f} ms of the front's CPU a step")
            with ThreadPoolExecutor(16) as pool:
                make = lambda seed: client.create_lora_training_client(rank=1, seed=seed)  # noqa: E731
                list(pool.map(make, range(idle)))
            print(f"beside {idle} idle runs: {step_ms(one, front):.2f} ms")


if __name__ == "__main__":
    main()

"""How long do callers wait when a process is killed? From kill -9 of the trainer's engine, or of
its front, to the first answer, and to that of the last of 1, 8 or 64 runs that all call at once.

Wall time, on a tiny model: what a start takes is the baseline, so what is above it is recovery.
Every run has a row on disk and steps behind it, which are computed again.
"""

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from pathlib import Path

import mint
from benchmarks.comparison import Row, report
from benchmarks.trainer_fairness import some
from mint import types
from tests.models import tiny_qwen3
from tests.supervised import Supervised, supervised

RUNS = (1, 8, 64)
STEPS = 10  # to be computed again
ADAM = types.AdamParams(learning_rate=1e-4)
Client = mint.TrainingClient


def await_ready(client: mint.ServiceClient) -> None:
    """Waits until the engine is up."""
    while not client.get_server_capabilities().supported_models:
        time.sleep(0.02)


def train(clients: Sequence[Client]) -> None:
    data = some(128, 0)
    for _ in range(STEPS):
        steps = []
        for client in clients:
            client.forward_backward(data)
            steps.append(client.optim_step(ADAM))
        for future in steps:
            future.result()


def waits_s(kill: Callable[[], None], clients: Sequence[Client]) -> tuple[float, float]:
    """Seconds from a kill to the first answer and to the last."""
    data = some(128, 1)
    started = time.monotonic()
    kill()
    ends = [
        time.monotonic() - started
        for _ in as_completed([client.forward_backward(data) for client in clients])
    ]
    for client in clients:
        client.optim_step(ADAM).result()
    return ends[0], ends[-1]


def measure(service: Supervised, client: mint.ServiceClient, start_s: float) -> list[Row]:
    rows = []
    clients: list[Client] = []
    for count in RUNS:
        while len(clients) < count:
            clients.append(client.create_lora_training_client(rank=16, seed=len(clients)))
        for name, kill in (("engine", service.kill_engine), ("front", service.kill)):
            train(clients)
            first, last = waits_s(kill, clients)
            for which, seconds in (("first", first), ("last", last)):
                title = f"kill -9 of the {name}, {count} runs, {which} answer"
                rows.append(Row(title, seconds, start_s, seconds / start_s, None, "s", "lower"))
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_qwen3(folder / "model")
        started = time.monotonic()
        with (
            supervised(
                "trainer_service", folder, (), base_model=model, device="cpu", threads=1
            ) as service,
            mint.ServiceClient(base_url=service.address) as client,
        ):
            await_ready(client)
            start_s = time.monotonic() - started
            rows = measure(service, client, start_s)
            engine_s = statistics.median(
                map(float, re.findall(r"start_s=(\S+)", service.log_text()))
            )
    start = Row("start of front and engine, nothing to restore", start_s, start_s, 1, None, "s")
    engine = Row("start of an engine", engine_s, start_s, engine_s / start_s, None, "s", "lower")
    report([start, engine, *rows])


if __name__ == "__main__":
    main()

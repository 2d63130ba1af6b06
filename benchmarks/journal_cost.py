"""What does durability cost? The trainer with its journal, and one that writes nothing, in turn.

Wall time on a tiny model over gRPC: milliseconds that the journal adds to a call, throughput of
eight tenants, and bytes that the front writes per step beside a row written with every step.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil

import mint
from benchmarks.comparison import Row, report
from benchmarks.service_overhead import elapsed_ms
from benchmarks.trainer_fairness import some
from mint import types
from tests.models import tiny_qwen3
from tests.supervised import Supervised, supervised

TENANTS, RANK, STEPS = 8, 16, 20
ROUNDS, CALLS = 12, 10  # the first round warms up
ADAM = types.AdamParams(learning_rate=1e-4)
MOST_ADDED_MS, LEAST_THROUGHPUT, MOST_BYTES = 2.0, 0.98, 1 / 15
BYTES_PER_PARAMETER = 12  # of a row: weights and moments
Client = mint.TrainingClient


@contextmanager
def trainer(module: str, model: Path, folder: Path) -> Iterator[tuple[Supervised, list[Client]]]:
    """A trainer that writes no rows meanwhile, with a run for each tenant."""
    folder.mkdir()
    flags = {"base_model": model, "device": "cpu", "threads": 1, "snapshot_s": 1e6}
    with (
        supervised(module, folder, (), **flags) as service,
        mint.ServiceClient(base_url=service.address) as client,
    ):
        yield (
            service,
            [client.create_lora_training_client(rank=RANK, seed=i) for i in range(TENANTS)],
        )


def added_ms(name: str, both: Sequence[Callable[[], object]], target: float | None) -> Row:
    """Medians, and by how much calls with a journal exceed their round's without."""
    times = [[[elapsed_ms(call) for _ in range(CALLS)] for call in both] for _ in range(ROUNDS)]
    ours, baseline = np.array(times)[1:].swapaxes(0, 1)  # [rounds, calls]
    added = ours - np.median(baseline, axis=1, keepdims=True)
    name = f"{name}, ms added (p95 {np.quantile(added, 0.95):.2f})"
    median = float(np.median(added))
    medians = map(float, map(np.median, (ours, baseline)))
    return Row(name, *medians, ratio=median, target=target, unit="ms", better="lower")


def passes(clients: Sequence[Client], tokens: int) -> list[Callable[[], object]]:
    data = some(tokens, 0)
    return [lambda c=client: c.forward_backward(data).result() for client in clients]


def step(client: Client, data: list[types.Datum]) -> None:
    computed = client.forward_backward(data)
    client.optim_step(ADAM).result()
    computed.result()


def train_all(clients: Sequence[Client], data: list[types.Datum]) -> None:
    def train(client: Client) -> None:
        for _ in range(STEPS):
            step(client, data)

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(train, clients))


def throughput(both: Sequence[Sequence[Client]]) -> Row:
    data = some(256, 1)
    times = [[elapsed_ms(lambda c=c: train_all(c, data)) / 1e3 for c in both] for _ in range(10)]
    ours, baseline = (float(np.median(each)) for each in np.array(times)[1:].T)
    ratio = float(np.median([without / with_ for with_, without in times[1:]]))
    name = f"{TENANTS} tenants x {STEPS} steps of 256 tokens"
    return Row(name, ours, baseline, ratio, LEAST_THROUGHPUT, "seconds")


def bytes_per_step(service: Supervised, clients: Sequence[Client]) -> Row:
    """What the front writes: its journal, whose log comes to the database later, too."""
    front = psutil.Process(service.pid)
    before = front.io_counters().write_bytes
    train_all(clients, some(128, 2))
    written = (front.io_counters().write_bytes - before) / (STEPS * len(clients))
    row = BYTES_PER_PARAMETER * clients[0].training_run.trainable_parameter_count
    name = f"a step of 128 tokens, beside a row of rank {RANK}"
    return Row(name, written, row, written / row, MOST_BYTES, "bytes", "lower")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_qwen3(folder / "model")
        with (
            trainer("trainer_service", model, folder / "journal") as (service, ours),
            trainer("benchmarks.journalless_service", model, folder / "none") as (_, others),
        ):
            pair = (ours[0], others[0])
            rows = [
                added_ms("forward_backward of 128 tokens", passes(pair, 128), MOST_ADDED_MS),
                added_ms("forward_backward of 2,048 tokens", passes(pair, 2048), None),
                added_ms(
                    "a step of 128 tokens", [partial(step, c, some(128, 0)) for c in pair], None
                ),
            ]
            rows += [throughput((ours, others)), bytes_per_step(service, ours)]
    report(rows)


if __name__ == "__main__":
    main()

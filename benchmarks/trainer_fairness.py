"""Does a large tenant slow small ones? One sends batches of 50 micro-batches without end, seven
send steps of 256 tokens each, over gRPC to one trainer with a tiny model; wall time.

Without keys every run counts as a tenant. A small tenant should wait for one micro-batch at most,
beside what its step takes alone.
"""

import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import mint
from benchmarks.comparison import Row, report
from benchmarks.workloads import random_documents
from mint import types
from tests.models import VOCABULARY_SIZE, tiny_qwen3
from tests.servers import running_trainer
from trainer_service.jobs import Document

SMALL_TENANTS, SMALL_TOKENS = 7, 256
STEPS, WARM_UP = 40, 5
MICRO_BATCHES = 50  # of a large batch
MICRO_BATCH_TOKENS, DOCUMENT_TOKENS = 1024, 128
TARGET = 2.0
ADAM = types.AdamParams(learning_rate=1e-4)


def data(documents: Sequence[Document]) -> list[types.Datum]:
    return [
        types.Datum(
            types.ModelInput.from_ints(d.tokens.tolist()),
            {"target_tokens": d.targets, "weights": d.weights},
        )
        for d in documents
    ]


def some(tokens: int, seed: int) -> list[types.Datum]:
    lengths = [DOCUMENT_TOKENS] * (tokens // DOCUMENT_TOKENS)
    return data(random_documents(lengths, vocabulary_size=VOCABULARY_SIZE, seed=seed))


def step_s(client: mint.TrainingClient, batch: list[types.Datum]) -> float:
    """Seconds of a step of training as its user sees it."""
    started = time.perf_counter()
    computed = client.forward_backward(batch)
    stepped = client.optim_step(ADAM)
    computed.result()
    stepped.result()
    return time.perf_counter() - started


def small_steps(clients: Sequence[mint.TrainingClient]) -> list[list[float]]:
    """Seconds of each client's steps, all clients at once."""
    times: list[list[float]] = [[] for _ in clients]

    def train(i: int) -> None:
        batch = some(SMALL_TOKENS, i)
        times[i] = [step_s(clients[i], batch) for _ in range(STEPS + WARM_UP)][WARM_UP:]

    threads = [threading.Thread(target=train, args=(i,)) for i in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def flood(client: mint.TrainingClient, stop: threading.Event, started: threading.Event) -> None:
    """Keeps two large batches with the trainer."""
    batch = some(MICRO_BATCHES * MICRO_BATCH_TOKENS, 99)
    waiting = [client.forward_backward(batch)]
    while not stop.is_set():
        waiting.append(client.forward_backward(batch))
        started.set()
        waiting.pop(0).result()
    waiting.pop().result()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_qwen3(Path(folder, "model"))
        flags = {"threads": 1, "max_batch_tokens": MICRO_BATCH_TOKENS}
        with (
            running_trainer(model, Path(folder, "store"), **flags) as trainer,
            mint.ServiceClient(base_url=trainer.address) as service,
        ):
            clients = [
                service.create_lora_training_client(rank=16, seed=i) for i in range(SMALL_TENANTS)
            ]
            large = service.create_lora_training_client(rank=16, seed=99)
            (alone,) = small_steps(clients[:1])
            micro_batch = some(MICRO_BATCH_TOKENS, 1)
            micro = [step_s(large, micro_batch) for _ in range(STEPS)][WARM_UP:]
            stop, started = threading.Event(), threading.Event()
            thread = threading.Thread(target=flood, args=(large, stop, started))
            thread.start()
            started.wait()
            crowded = small_steps(clients)
            stop.set()
            thread.join()
    allowed = float(np.median(micro) + np.median(alone))
    worst = max(float(np.quantile(times, 0.95)) for times in crowded)
    name = f"worst of {SMALL_TENANTS} tenants, p95 step of {SMALL_TOKENS} tokens"
    report([Row(name, worst, allowed, worst / allowed, TARGET, "seconds", "lower")])


if __name__ == "__main__":
    main()

"""Do 200 runs of rank 16 on SmolLM2 live in 8 GiB? Each takes two steps of training, over gRPC, in
turn and so that a run is away when its second step comes. Takes about half an hour.

Measured is the resident memory of the trainer's processes together; ours is its peak.
"""

import tempfile
import threading
from pathlib import Path

import psutil

import mint
from benchmarks.comparison import Row, report
from benchmarks.workloads import SMOLLM2, arithmetic
from mint import types
from tests.servers import RunningService, running_trainer

RUNS, ROUNDS = 200, 2
LIMIT_BYTES = 8 * 2**30
WATCH_S = 0.2
ADAM = types.AdamParams(learning_rate=1e-3)


class MemoryWatch(threading.Thread):
    """Notes the peak of the resident memory of a service and its engine."""

    def __init__(self, service: RunningService) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(service.process.pid)
        self._stop = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._stop.wait(WATCH_S):
            self.peak_bytes = max(self.peak_bytes, self._resident_bytes())

    def finish(self) -> int:
        self._stop.set()
        self.join()
        return self.peak_bytes

    def _resident_bytes(self) -> int:
        processes = [self._process, *self._process.children(recursive=True)]
        return sum(process.memory_info().rss for process in processes)


def batch() -> list[types.Datum]:
    return [
        types.Datum(
            types.ModelInput.from_ints(d.tokens.tolist()),
            {"target_tokens": d.targets, "weights": d.weights},
        )
        for d in arithmetic(1)
    ]


def step(client: mint.TrainingClient, data: list[types.Datum]) -> float:
    """The loss before the step."""
    computed = client.forward_backward(data)
    client.optim_step(ADAM).result()
    return float(computed.result().metrics["loss:sum"])


def main() -> None:
    data = batch()
    with (
        tempfile.TemporaryDirectory() as store,
        running_trainer(SMOLLM2, Path(store), threads=1) as trainer,
        mint.ServiceClient(base_url=trainer.address) as service,
    ):
        watch = MemoryWatch(trainer)
        watch.start()
        clients = [service.create_lora_training_client(rank=16, seed=i) for i in range(RUNS)]
        losses = [[step(client, data) for client in clients] for _ in range(ROUNDS)]
        peak = watch.finish()
    progressed = sum(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    gib = peak / 2**30
    report(
        [
            Row(
                f"{RUNS} runs, peak resident memory",
                gib,
                LIMIT_BYTES / 2**30,
                peak / LIMIT_BYTES,
                1.0,
                "GiB",
                "lower",
            ),
            Row(
                f"runs of {RUNS} whose loss fell", progressed, RUNS, progressed / RUNS, 1.0, "runs"
            ),
        ]
    )


if __name__ == "__main__":
    main()

"""What do texts cost through the server? CPU time of 10,000 short ones beside the tokenizer's own,
and what they add to a step of a training beside them.
"""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
from transformers import AutoTokenizer

import mint
from benchmarks.service_overhead import make_data, make_model
from mintrpc.v1 import model_pb2, model_pb2_grpc
from tests.servers import RunningService, running_trainer

TEXTS = [f"The answer to question {n} is {n * 7}, and nobody knows why." for n in range(10_000)]
BATCH = 500
STEPS, ROUNDS = 60, 7
TARGET_TIMES, TARGET_STEP = 2.0, 1.05


def cpu_s(service: RunningService, *, texts: bool) -> float:
    """Of the front and the process that has the tokenizer, or of the front and the engine."""
    front = psutil.Process(service.process.pid)
    module = "mint_core.text" if texts else "trainer_service.engine"
    beside = [child for child in front.children() if module in child.cmdline()]
    times = [process.cpu_times() for process in (front, *beside)]
    return sum(each.user + each.system for each in times)


def tokenize(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        for start in range(0, len(TEXTS), BATCH):
            stub.Tokenize(model_pb2.TokenizeRequest(texts=TEXTS[start : start + BATCH]))


def step_cpu_s(service: RunningService, run: mint.TrainingClient) -> float:
    """Of the engine alone, a step."""
    data, _ = make_data(1, 2048)
    front = psutil.Process(service.process.pid)
    (engine,) = (c for c in front.children() if "trainer_service.engine" in c.cmdline())
    before = engine.cpu_times()
    for _ in range(STEPS):
        run.forward_backward(data)
        run.optim_step(mint.types.AdamParams()).result()
    after = engine.cpu_times()
    return (after.user + after.system - before.user - before.system) / STEPS


def rounds(trainer: RunningService, run: mint.TrainingClient) -> Iterator[tuple[float, float]]:
    """CPU seconds of a step alone and beside texts without end, in turn."""
    for _ in range(ROUNDS):
        alone_s = step_cpu_s(trainer, run)
        stop = threading.Event()

        def keep_on(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                tokenize(trainer.address)

        texts = threading.Thread(target=keep_on)
        texts.start()
        beside_s = step_cpu_s(trainer, run)
        stop.set()
        texts.join()
        yield alone_s, beside_s


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name, "model"))
        with (
            running_trainer(model, Path(name, "store")) as trainer,
            mint.ServiceClient(base_url=trainer.address) as service,
        ):
            tokenize(trainer.address)  # starts the process
            before = cpu_s(trainer, texts=True)
            tokenize(trainer.address)
            served_s = cpu_s(trainer, texts=True) - before
            run = service.create_lora_training_client(rank=16)
            step_cpu_s(trainer, run)
            ratios = [beside_s / alone_s for alone_s, beside_s in rounds(trainer, run)]
        tokenizer = AutoTokenizer.from_pretrained(model)
        started = time.process_time()
        for start in range(0, len(TEXTS), BATCH):
            tokenizer(TEXTS[start : start + BATCH], add_special_tokens=False)
        own_s = time.process_time() - started
    row = {
        "name": f"{len(TEXTS)} texts",
        "served_s": round(served_s, 3),
        "own_s": round(own_s, 3),
        "times": round(served_s / own_s, 2),
        "times_target": TARGET_TIMES,
        "step_times": round(statistics.median(ratios), 3),
        "step_times_of_rounds": [round(ratio, 3) for ratio in ratios],
        "step_target": TARGET_STEP,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()

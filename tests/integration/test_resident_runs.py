"""Many more runs than memory for rows holds: all make progress, none notices."""

from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest

from mintrpc.v1 import trainer_pb2, trainer_pb2_grpc, types_pb2
from tests.servers import RunningService, running_trainer
from tests.trainer_rpc import RawRun, create, datum, floats, lora_config

RUNS, STEPS = 200, 2
ROW_MIB = 4  # of the tiny model 6 rows of rank 16, moments and gradient included
RATE = types_pb2.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def trainer(
    qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    with running_trainer(
        qwen3_folder, tmp_path_factory.mktemp("store"), row_memory_mib=ROW_MIB
    ) as running:
        yield running


def make(stub: trainer_pb2_grpc.TrainerServiceStub, seed: int) -> RawRun:
    return create(stub, lora_config=lora_config(rank=16, seed=seed))


def backward(run: RawRun, seed: int) -> trainer_pb2.ForwardBackwardRequest:
    tokens = [(7 * seed + 13 * place) % 500 for place in range(6)]
    return run.forward_backward(datum(tokens))


def logprobs(answer: trainer_pb2.ForwardBackwardResponse) -> list[float]:
    return floats(answer.outputs[0].logprobs)


def rows(trainer: RunningService) -> dict[str, float]:
    """How many rows are where, as Prometheus sees it."""
    with urlopen(f"http://{trainer.metrics_address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.split() for line in lines if line.startswith("mint_rows{")]
    return {label.split('"')[1]: float(value) for label, value in pairs}


def test_two_hundred_runs_share_room_for_six(trainer: RunningService) -> None:
    with grpc.insecure_channel(trainer.address) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        runs = [make(stub, seed) for seed in range(RUNS)]
        history: list[list[list[float]]] = [[] for _ in runs]
        for _ in range(STEPS):  # all at once: plans and steps need more rows than there is room for
            calls = [
                (run.start(backward(run, seed)), run.start(run.optim_step(adam_params=RATE)))
                for seed, run in enumerate(runs)
            ]
            for seed, (computed, stepped) in enumerate(calls):
                history[seed].append(logprobs(computed.result()))
                stepped.result()
        assert all(run.describe().step == STEPS for run in runs)
        counts = rows(trainer)
        assert counts["device"] + counts["disk"] == RUNS
        assert counts["device"] < 30  # rows without gradient or moments are smaller

        for seed in (0, 77, RUNS - 1):
            alone = make(stub, seed)
            for step in range(STEPS):
                assert logprobs(alone.send(backward(alone, seed))) == history[seed][step]
                alone.send(alone.optim_step(adam_params=RATE))
            state, again = (
                run.send(run.forward(datum([1, 2, 3, 4]))) for run in (alone, runs[seed])
            )
            assert floats(state.outputs[0].logprobs) == floats(again.outputs[0].logprobs)

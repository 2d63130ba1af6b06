"""How long does it take from the trainer's weights to the first token on another host?

One trainer and two samplers: one shares its folder and memory, the other gets adapters over the
wire. In turn, weights are published and one token is sampled from them, of a prompt of 16, with
each of the two. A tiny model with an adapter of rank 4, and SmolLM2 with one of rank 32 on all
linear layers and the head (45 MB). Milliseconds of wall time; ratios are medians of the rounds,
since the machine has other work.
"""

import itertools
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np

from benchmarks.comparison import Row, report, share
from benchmarks.sampler_handoff import RANK, SAMPLER, TRAINER, elapsed_ms
from benchmarks.workloads import SMOLLM2
from mintrpc.v1 import trainer_pb2_grpc
from tests.models import tiny_qwen3
from tests.samplers import Sampler, connected
from tests.servers import running_sampler, running_trainer
from tests.trainer_rpc import RawRun, create, datum, lora_config

PROMPT_TOKENS, ROUNDS = 16, 5
PAUSE_S = 1.0  # what is stored behind an acknowledgement is no part of what comes next
ONE_TOKEN = {"max_tokens": 1}


class Publishing:
    """A run whose weights samplers get."""

    def __init__(self, run: RawRun, named: bool) -> None:
        self._run, self._named = run, named
        self._rng = np.random.default_rng(0)
        self._numbers = itertools.count()

    def publish_and_sample(self, sampler: Sampler) -> None:
        name = f"n{next(self._numbers)}" if self._named else ""
        path = self._run.send(self._run.save_for_sampler(name)).revision_path
        prompt = tuple(self._rng.integers(100, 500, PROMPT_TOKENS).tolist())
        sampler.sample(prompt, model_path=path, params=ONE_TOKEN)


def first_token_ms(publishing: Publishing, sampler: Sampler) -> float:
    time.sleep(PAUSE_S)
    return elapsed_ms(lambda: publishing.publish_and_sample(sampler))


def measure(
    name: str, model: Path, rank: int, trainer: dict[str, object], sampler: dict[str, object]
) -> list[Row]:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        service = stack.enter_context(running_trainer(model, root / "store", **trainer))
        shared = running_sampler(model, root / "store", **sampler)
        wire = running_sampler(
            model, f"http://{service.address}", local_folder=root / "away", **sampler
        )
        beside, away = (
            stack.enter_context(connected(stack.enter_context(each), root / "store"))
            for each in (shared, wire)
        )
        channel = stack.enter_context(grpc.insecure_channel(service.address))
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        run = create(stub, lora_config=lora_config(rank=rank))
        run.send(run.forward_backward(datum([5, 6, 7, 8])))
        run.send(run.optim_step())
        rows = []
        for kind, named in (("unnamed", False), ("named", True)):
            publishing = Publishing(run, named)
            rounds = [
                (first_token_ms(publishing, away), first_token_ms(publishing, beside))
                for _ in range(ROUNDS + 1)
            ]
            ours, theirs = zip(*rounds[1:], strict=True)  # the first warms up
            rows.append(share(f"{name}, {kind}: over the wire", ours, theirs, None, "ms"))
        return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_qwen3(Path(folder))
        report(
            [
                *measure("tiny, rank 4", tiny, 4, {}, {}),
                *measure("SmolLM2, rank 32", SMOLLM2, RANK, dict(TRAINER), dict(SAMPLER)),
            ]
        )


if __name__ == "__main__":
    main()

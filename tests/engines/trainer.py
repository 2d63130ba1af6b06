"""A trainer's engine without a model: it answers with what it was asked, and waits on request.

`python -m tests.engines.trainer FD`. A plan with a tile of WAIT's number is answered when the next
job, of whatever kind, has arrived. A tile's metrics say how many runs are to come.
"""

import os

import numpy as np

from mint_core.engine_host.pipe import Hello, Reply, connect
from mint_core.errors import FailedPrecondition
from mint_core.lora.spec import AdapterSpec
from tests.engines.echo_jobs import MODEL
from trainer_service.jobs import (
    CreateRow,
    Plan,
    RowDescription,
    StepResult,
    StepRows,
    Tile,
    TileResult,
)

MAX_BATCH_TOKENS = 64
WAIT = 99  # sequence of a tile
DIE = 66  # sequence of a tile
REFUSED_RATE = 13.0  # learning rate of a step that is refused


def main() -> None:
    pipe, _ = connect()
    pipe.send(Hello(MODEL, MAX_BATCH_TOKENS))
    plans = jobs = 0
    while (call := pipe.receive()) is not None:
        jobs += isinstance(call.job, Plan | StepRows)
        if isinstance(call.job, Plan):
            plans += 1
            if any(tile.sequence == DIE for tile in call.job.tiles):
                os._exit(3)
            if any(tile.sequence == WAIT for tile in call.job.tiles):
                pipe.send(Reply(pipe.receive().number, None))
        pipe.send(Reply(call.number, answer(call.job, plans, jobs)))


def answer(job: object, plans: int, jobs: int) -> object:
    """`jobs` counts plans and optimizer steps; a step tells it as its norm, a tile as logprobs."""
    match job:
        case Plan(tiles, coming):
            metrics = {"plan:sum": plans, "coming:sum": len(coming)}
            return tuple(tile_result(tile, jobs, metrics) for tile in tiles)
        case StepRows(steps):
            error = FailedPrecondition("no")
            return tuple(
                StepResult(
                    step=len(steps),
                    grad_norm=float(jobs),
                    error=error if step.adam_params.learning_rate == REFUSED_RATE else None,
                )
                for step in steps
            )
        case CreateRow():
            spec = AdapterSpec(rank=1, alpha=1.0, use_rslora=False, seed=1, modules=("lm_head",))
            return RowDescription(spec=spec, trainable_parameter_count=1, row_bytes=4)
    return None


def tile_result(tile: Tile, jobs: int, metrics: dict[str, float]) -> TileResult:
    logprobs = tuple(np.full(len(each.tokens), jobs, np.float32) for each in tile.documents)
    return TileResult(logprobs=logprobs, metrics=metrics)


if __name__ == "__main__":
    main()

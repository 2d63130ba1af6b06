"""Which jobs the calls of several runs become, counted by a real engine that has no model."""

import asyncio
from pathlib import Path
from typing import Any

from mintrpc.v1 import trainer_pb2
from tests.unit.trainer_service.fronts import backward, fronting, optim_step


def job_of(answer: Any) -> float:
    """Number of the engine's job that ended a call."""
    name = "grad_norm:mean" if isinstance(answer, trainer_pb2.OptimStepResponse) else "job:max"
    return float(answer.metrics[name])


async def test_steps_of_runs_that_shared_a_plan_go_together_before_the_next(
    tmp_path: Path,
) -> None:
    """And answers leave as soon as a run's own work is done."""
    async with fronting(tmp_path) as front:
        heavy, *small = [await front.create() for _ in range(4)]
        flood = front.submit(backward(heavy, 1, [30] * 10))
        calls = [front.submit(backward(run, 1, [8])) for run in small]
        steps = [front.submit(optim_step(run, 2)) for run in small]

        outcomes = await asyncio.gather(*calls)
        assert not flood.done()
        stepped = await asyncio.gather(*steps)
        assert not flood.done()

        assert [job_of(outcome) for outcome in outcomes] == [1, 1, 1]
        assert [job_of(outcome) for outcome in stepped] == [2, 2, 2]
        assert [outcome.step for outcome in stepped] == [3, 3, 3]
        assert job_of(await flood) > 5


async def test_a_step_waits_for_its_own_backwards_alone(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        long, short = [await front.create() for _ in range(2)]
        calls = [
            front.submit(backward(long, 1, [30] * 6)),
            front.submit(optim_step(long, 2)),
            front.submit(backward(short, 1, [8])),
            front.submit(optim_step(short, 2)),
        ]

        jobs = [job_of(outcome) for outcome in await asyncio.gather(*calls)]

        assert jobs[3] == jobs[2] + 1
        assert jobs[3] < jobs[0] < jobs[1]

"""How work reaches the engine, with a real engine process that has no model."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from mint_core.engine_host import process as engine_process
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, FailedPrecondition, TrainingRunNotFound
from mint_core.lora.spec import LoraRequest
from mint_core.rpc.metrics import Metrics
from tests.engines.trainer import DIE, REFUSED_RATE, WAIT
from tests.unit.trainer_service.calls import step, tiles
from trainer_service.jobs import ClearGradient, CreateRow, TileResult
from trainer_service.queue.scheduler import Forecast, NotStarted, Scheduler
from trainer_service.queue.usage import Usage

LIMIT_S = 30.0


@asynccontextmanager
async def scheduling(weights: Mapping[str, float] | None = None) -> AsyncIterator[Scheduler]:
    engine = EngineProcess("tests.engines.trainer", "no settings")
    weight_of = weights.__getitem__ if weights else lambda tenant: 1.0
    scheduler = Scheduler(engine, Usage(Metrics()), weight_of)
    async with asyncio.timeout(LIMIT_S):
        scheduler.welcome(await engine.start())
        feeding = asyncio.create_task(scheduler.run())
        try:
            yield scheduler
        finally:
            feeding.cancel()
            await engine.close()


Computed = tuple[list[TileResult], float]


def plan_of(computed: Computed) -> list[float]:
    return [result.metrics["plan:sum"] for result in computed[0]]


def job(run: str) -> CreateRow:
    return CreateRow(training_run_id=run, request=LoraRequest(rank=1))


async def busy(scheduler: Scheduler, sequence: int) -> asyncio.Task[Computed]:
    """Gives the engine a plan of its own, which it has when this returns."""
    task = asyncio.create_task(scheduler.compute("x", tiles("first", sequence, 4), 1))
    while not scheduler.busy:
        await asyncio.sleep(0)
    return task


async def test_what_waits_goes_together_when_the_engine_is_idle() -> None:
    async with scheduling() as scheduler:
        first = await busy(scheduler, WAIT)
        runs = [
            asyncio.create_task(scheduler.compute("x", tiles(run, 1, 8), 1))
            for run in ("a", "b", "c")
        ]
        await asyncio.sleep(0)
        await scheduler.row(ClearGradient("first"), 1)  # which the engine waits for

        assert plan_of(await first) == [1]
        assert [plan_of(await each) for each in runs] == [[2], [2], [2]]


async def test_what_is_ready_at_once_goes_together() -> None:
    async with scheduling() as scheduler:
        answers = await asyncio.gather(
            *(scheduler.compute("x", tiles(run, 1, 8), 1) for run in ("a", "b", "c"))
        )

        assert [plan_of(each) for each in answers] == [[1], [1], [1]]


async def test_a_large_call_takes_several_plans_and_keeps_its_order() -> None:
    async with scheduling() as scheduler:
        computed = await scheduler.compute("x", tiles("a", 1, 30, 30, 30, 30, 30), 1)

        assert plan_of(computed) == [1, 1, 2, 2, 3]
        assert [len(result.logprobs[0]) for result in computed[0]] == [30] * 5


async def test_a_plan_names_the_runs_whose_tiles_come_next() -> None:
    async with scheduling() as scheduler:
        answers = await asyncio.gather(
            *(scheduler.compute("x", tiles(run, 1, 60), 1) for run in ("a", "b", "c"))
        )

        assert [results[0].metrics["coming:sum"] for results, _ in answers] == [2, 1, 0]


async def test_steps_of_many_runs_go_together() -> None:
    async with scheduling() as scheduler:
        results = await asyncio.gather(
            *(scheduler.step("x", step(run), 1) for run in ("a", "b", "c"))
        )

        assert [result.step for result in results] == [3, 3, 3]  # steps of the job, says the engine


async def test_tenants_share_a_plan_as_their_weights_say() -> None:
    async with scheduling({"ann": 3.0, "bob": 1.0}) as scheduler:
        plans = await asyncio.gather(
            *(
                scheduler.compute(tenant, tiles(tenant, sequence, 8), 1)
                for tenant in ("bob", "ann")
                for sequence in range(1, 13)
            )
        )

        bobs, anns = ([plan_of(each)[0] for each in part] for part in (plans[:12], plans[12:]))
        assert (anns.count(1), bobs.count(1)) == (6, 2)  # eight tiles fill a plan


async def test_a_forecast_counts_what_the_engine_has_and_what_comes_first() -> None:
    async with scheduling() as scheduler:
        before = scheduler.forecast("x", "b")
        first = await busy(scheduler, WAIT)  # 4 tokens
        waiting = [
            asyncio.create_task(scheduler.compute("x", tiles(run, 1, 8), 1)) for run in ("a", "b")
        ]
        await asyncio.sleep(0)
        while_unknown = scheduler.forecast("x", "b")
        await scheduler.row(ClearGradient("first"), 1)
        await asyncio.gather(first, *waiting)

        assert before == Forecast(0, 0.0)
        assert while_unknown == Forecast(4 + 8, None)
        assert scheduler.predict_s("x", "b", 100) == 0.0  # nothing waits
        second = await busy(scheduler, WAIT)
        third = asyncio.create_task(scheduler.compute("x", tiles("b", 2, 8), 1))
        await asyncio.sleep(0)
        known = scheduler.forecast("x", "b")
        assert known.tokens_ahead == 4
        assert known.wait_s is not None
        assert scheduler.predict_s("x", "b", 8) > 0
        await scheduler.row(ClearGradient("first"), 1)
        await asyncio.gather(second, third)


async def test_a_refused_step_is_refused_alone() -> None:
    async with scheduling() as scheduler:
        results = await asyncio.gather(
            scheduler.step("x", step("a"), 1),
            scheduler.step("x", step("b", learning_rate=REFUSED_RATE), 1),
            return_exceptions=True,
        )

        assert isinstance(results[1], FailedPrecondition)
        assert not isinstance(results[0], BaseException)


async def test_an_engine_that_dies_fails_what_it_had_and_what_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_process, "RESTART_DELAY_S", 0.05)
    async with scheduling() as scheduler:
        first = await busy(scheduler, DIE)
        waiting = [
            asyncio.create_task(scheduler.compute("x", tiles("a", 1, 60, 60), 1)),
            asyncio.create_task(scheduler.step("x", step("b"), 1)),
        ]

        with pytest.raises(EngineDied) as caught:
            await first
        assert not isinstance(caught.value, NotStarted)
        for task in waiting:
            with pytest.raises(NotStarted, match="has ended"):
                await task

        with pytest.raises(NotStarted):
            await scheduler.row(job("c"), 1)  # the life that has ended
        assert await scheduler.up() == 2  # waits for the next engine
        await scheduler.row(job("c"), 2)
        assert plan_of(await scheduler.compute("x", tiles("c", 1, 4), 2)) == [1]


async def test_what_waits_in_the_engine_behind_work_that_ends_it_is_not_to_blame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_process, "RESTART_DELAY_S", 0.05)
    async with scheduling() as scheduler:
        deadly = await busy(scheduler, DIE)
        row = asyncio.create_task(scheduler.row(job("c"), 1))

        with pytest.raises(EngineDied) as caught:
            await deadly
        assert not isinstance(caught.value, NotStarted)
        with pytest.raises(NotStarted, match="exit code 3"):
            await row


async def test_what_is_withdrawn_fails_and_holds_nobody_up() -> None:
    async with scheduling() as scheduler:
        first = await busy(scheduler, WAIT)
        gone = asyncio.create_task(scheduler.compute("x", tiles("a", 1, 8, 30, 30), 1))
        step_too = asyncio.create_task(scheduler.step("x", step("a"), 1))
        stays = asyncio.create_task(scheduler.compute("x", tiles("b", 1, 8), 1))
        await asyncio.sleep(0)

        scheduler.withdraw("a", TrainingRunNotFound("a"))

        for task in (gone, step_too):
            with pytest.raises(TrainingRunNotFound):
                await task
        await scheduler.row(ClearGradient("first"), 1)
        assert plan_of(await stays) == [2]
        assert plan_of(await first) == [1]
        assert scheduler.forecast("x", "a") == Forecast(0, 0.0)


async def test_the_next_plan_waits_for_what_those_of_the_last_hand_in_but_not_for_long() -> None:
    async with scheduling() as scheduler:
        both = [scheduler.compute("x", tiles(run, 1, 8), 1) for run in ("a", "b")]
        flood = asyncio.create_task(scheduler.compute("y", tiles("c", 1, *[30] * 9), 1))

        await asyncio.gather(*both)
        scheduler.has_nothing_more("b")
        for _ in range(20):  # turns of the loop, in which "a" says nothing
            await asyncio.sleep(0)
        stepped = await scheduler.step("x", step("a"), 1)
        assert stepped.grad_norm == 2  # the job right behind

        assert plan_of(await flood)[-1] > 3
        assert plan_of(await scheduler.compute("x", tiles("b", 2, 8), 1))  # "a" says nothing more

"""The one task of a run, on a front with a real engine of sums."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from mint_core.errors import MintError, TrainingRunNotFound
from tests.unit.trainer_service.fronts import Front, backward, fronting, optim_step
from trainer_service.journal.run_journal import Past
from trainer_service.run.execution import Execution
from trainer_service.run.restoring import Restoring
from trainer_service.service import RESTORATIONS


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with fronting(tmp_path, engine_module="tests.engines.rows") as made:
        yield made


async def test_passes_go_together_and_all_else_in_order(front: Front) -> None:
    run = await front.create()
    calls = [
        front.submit(backward(run, 1, [4])),
        front.submit(backward(run, 2, [4])),
        front.submit(optim_step(run, 3)),
        front.submit(backward(run, 4, [4])),
        front.submit(optim_step(run, 5)),
    ]

    answers = await asyncio.gather(*calls)

    assert (answers[2].step, answers[4].step) == (1, 2)
    assert front.run(run).numbers.in_flight == 0
    assert front.run(run).inbox.at_rest.is_set()


async def test_an_errand_comes_between_the_calls_before_it_and_those_behind(front: Front) -> None:
    run = await front.create()
    ended: list[str] = []

    async def note() -> str:
        ended.append("errand")
        return "done"

    def told(name: str) -> None:
        ended.append(name)

    calls = [front.submit(backward(run, 1, [4])), front.submit(optim_step(run, 2))]
    await asyncio.sleep(0)
    calls[1].add_done_callback(lambda _: told("step"))
    errand = asyncio.create_task(front.run(run).inbox.behind(3, note))
    await asyncio.sleep(0)
    behind = front.submit(backward(run, 3, [4]))
    behind.add_done_callback(lambda _: told("behind"))

    assert await errand == "done"
    await asyncio.gather(*calls, behind)
    assert ended.index("errand") < ended.index("behind")


async def test_an_errand_of_a_run_that_is_deleted_is_told_so(front: Front) -> None:
    run = await front.create()
    front.scheduler.hold()
    waiting = front.submit(backward(run, 1, [4]))
    await asyncio.sleep(0)
    errand = asyncio.create_task(front.run(run).inbox.behind(2, asyncio.Event().wait))
    await asyncio.sleep(0)

    await front.delete(run)

    for each in (waiting, errand):
        with pytest.raises(TrainingRunNotFound):
            await each


async def test_a_run_whose_task_dies_is_given_up_and_harms_nobody(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = [await front.create() for _ in range(2)]
    honest = Execution.attempt

    async def broken(self: Execution, call: object) -> object:
        if self._run.id == bad:
            return "no outcome at all"
        return await honest(self, call)  # type: ignore[arg-type]

    monkeypatch.setattr(Execution, "attempt", broken)

    for number in (1, 2):  # what waits, and what comes later
        with pytest.raises(MintError) as caught:
            await front.submit(backward(bad, number, [4]))
        assert caught.value.reason == "TRAINING_RUN_LOST"
    await front.submit(backward(good, 1, [4]))

    assert "its task has died" in front.run(bad).view().lost
    assert any(record.exc_info for record in caplog.records)
    await front.delete(bad)


async def test_few_rows_come_back_together_so_that_the_first_of_many_comes_soon(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [await front.create() for _ in range(3 * RESTORATIONS)]
    honest, inside, most = Restoring._begin, 0, 0

    async def counted(self: Restoring, past: Past, life: int) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await honest(self, past, life)
        inside -= 1

    monkeypatch.setattr(Restoring, "_begin", counted)
    for engine in psutil.Process().children():
        if "tests.engines.rows" in engine.cmdline():
            engine.kill()

    answers = await asyncio.gather(*(front.submit(backward(run, 1, [4])) for run in runs))

    assert len(answers) == len(runs)
    assert 1 < most <= RESTORATIONS

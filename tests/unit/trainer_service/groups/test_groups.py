"""Groups of a front, with real engine processes that have no model."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mint_core.engine_host import process as engine_process
from mint_core.engine_host.process import EngineProcess
from mint_core.errors import EngineDied, FailedPrecondition, NotFound, Unavailable
from mint_core.hosting.tasks import Tasks
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import QuotaBook
from tests.engines.trainer import DIE
from tests.unit.trainer_service.calls import tiles
from tests.unit.trainer_service.fronts import Front, backward, fronting, optim_step
from trainer_service.config import TrainerConfig
from trainer_service.groups.desk import GroupDesk
from trainer_service.groups.groups import Groups
from trainer_service.jobs import ClearGradient
from trainer_service.queue.usage import Usage
from trainer_service.run_table import RunTable

LIMIT_S = 30.0


def made(config: TrainerConfig, number: int) -> EngineProcess:
    return EngineProcess("tests.engines.trainer", config)


@asynccontextmanager
async def grouped(count: int = 1) -> AsyncIterator[Groups]:
    tasks, metrics = Tasks(), Metrics()
    config = replace(TrainerConfig(), groups=count, device="cpu")
    table = RunTable(QuotaBook(None, metrics))
    groups = Groups(config, made, Usage(metrics), lambda tenant: 1.0, table, tasks)
    async with asyncio.timeout(LIMIT_S):
        await groups.start()
        groups.feed()
        try:
            yield groups
        finally:
            await tasks.stop()
            await groups.close()


def test_there_is_no_model_before_an_engine_was_up() -> None:
    metrics = Metrics()
    groups = Groups(
        TrainerConfig(),
        made,
        Usage(metrics),
        lambda tenant: 1.0,
        RunTable(QuotaBook(None, metrics)),
        Tasks(),
    )

    assert groups.description is None
    with pytest.raises(Unavailable, match="still being loaded"):
        _ = groups.model


async def test_a_job_without_a_row_goes_to_the_next_engine_but_waits_for_none_at_the_end() -> None:
    async with grouped() as groups:
        scheduler = groups.first.scheduler
        for life in (1, 2):
            dying = asyncio.create_task(scheduler.compute("x", tiles("a", DIE, 8), life))
            while not scheduler.busy:
                await asyncio.sleep(0)
            behind = asyncio.create_task(groups.store(ClearGradient("a")))
            if life == 2:
                groups.hold()
            with pytest.raises(EngineDied):
                await dying
            if life == 1:
                assert await behind is None
                assert scheduler.life == 2
            else:
                with pytest.raises(Unavailable, match="its engine has ended"):
                    await behind


async def test_a_job_without_a_row_goes_where_nothing_is_computed() -> None:
    async with grouped(2) as groups:
        dead, other = list(groups)
        dying = asyncio.create_task(dead.scheduler.compute("x", tiles("a", DIE, 8), 1))
        while not dead.scheduler.busy:
            await asyncio.sleep(0)

        assert await groups.store(ClearGradient("a")) is None
        with pytest.raises(EngineDied):
            await dying
        assert other.scheduler.life == 1


@asynccontextmanager
async def two_groups(folder: Path) -> AsyncIterator[Front]:
    async with fronting(folder, engine_module="tests.engines.rows", groups=2) as front:
        yield front


async def test_runs_spread_and_one_moves_between_two_calls(tmp_path: Path) -> None:
    async with two_groups(tmp_path) as front:
        names = [await front.create() for _ in range(4)]
        groups = front.service.groups
        assert sorted(groups.run_counts().values()) == [2, 2]
        moving, staying = front.run(names[0]), front.run(names[1])
        (target,) = [group for group in groups if group is not moving.group]
        for name in names[:2]:
            await front.submit(backward(name, 1, [4, 5]))

        assert await groups.move(moving, target)

        assert (moving.group, moving.has_row) == (target, False)
        for name in names[:2]:
            await front.submit(backward(name, 2, [4, 5]))
        answers = [await front.submit(optim_step(name, 3)) for name in names[:2]]
        assert answers[0] == answers[1]  # both began alike
        assert moving.has_row
        assert staying.group.scheduler.life == 1
        assert front.service.services.rows_restored._value.get() == 1.0


async def test_a_row_that_cannot_be_saved_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_groups(tmp_path) as front:
        name = await front.create()
        run = front.run(name)
        await front.submit(backward(name, 1, [4]))
        source = run.group
        (target,) = [group for group in front.service.groups if group is not source]
        real = source.scheduler.row

        async def failing(job: object, life: int, **options: object) -> object:
            if type(job).__name__ == "SaveRow":
                raise FailedPrecondition("no disk")
            return await real(job, life)

        monkeypatch.setattr(source.scheduler, "row", failing)
        assert not await front.service.groups.move(run, target)
        monkeypatch.undo()

        assert (run.group, run.has_row) == (source, True)
        await front.submit(optim_step(name, 2))


async def test_a_drained_group_is_gone_when_its_runs_are(tmp_path: Path) -> None:
    async with two_groups(tmp_path) as front:
        names = [await front.create() for _ in range(6)]
        desk = GroupDesk(front.service.groups, front.service.tasks)
        for name in names:
            await front.submit(backward(name, 1, [4]))

        told = desk.drain("group-0")
        assert told.runs == 3
        with pytest.raises(FailedPrecondition, match="no group but `group-1` takes runs"):
            desk.drain("group-1")
        while len(front.service.groups) == 2:
            await asyncio.sleep(0.01)

        with pytest.raises(NotFound, match="there is no group `group-0`"):
            desk.drain("group-0")
        for name in names:
            await front.submit(optim_step(name, 2))
            assert front.run(name).group.name == "group-1"
        added = await desk.add("", "third")
        assert (added.name, added.runs, len(front.service.groups)) == ("third", 0, 2)
        assert front.run(await front.create()).group.name == "third"


async def test_a_group_that_cannot_start_again_gives_its_runs_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "RESTART_DELAY_S", 0.05)
    async with two_groups(tmp_path) as front:
        names = [await front.create() for _ in range(2)]
        dead = front.run(names[1]).group
        for name in names:
            await front.submit(backward(name, 1, [4]))
            await front.service.services.saved_rows.want(front.run(name))
        (tmp_path / "broken").touch()
        assert dead.engine.pid
        os.kill(dead.engine.pid, signal.SIGKILL)

        answers = [await front.submit(optim_step(name, 2)) for name in names]

        assert answers[0] == answers[1]
        assert front.run(names[1]).group is not dead
        assert dead.failed
        (tmp_path / "broken").unlink()
        while not front.service.groups._placement.is_open(dead.name):
            await asyncio.sleep(0.05)
        assert not dead.failed


async def test_a_move_to_other_hardware_is_told_as_an_inexact_replay(tmp_path: Path) -> None:
    async with fronting(
        tmp_path, engine_module="tests.engines.rows", device="auto", devices="cpu,auto"
    ) as front:
        name = await front.create()
        run = front.run(name)
        await front.submit(backward(name, 1, [4]))
        (target,) = [group for group in front.service.groups if group is not run.group]

        await front.service.groups.move(run, target)
        await front.submit(optim_step(name, 2))

        state = run.state
        assert state.inexact_replays == 1
        assert state.inexact_note.startswith(f"it goes on in {target.name}")
        assert "device was" in state.inexact_note


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"groups": -1}, "`groups` must be at least 0"),
        ({"groups": 1000}, "`groups` must be at most 256"),
        ({"groups": 3, "devices": "cpu,cpu"}, "`groups` is 3 but `devices` names 2"),
        ({"devices": "cpu,"}, "`devices` cpu, has an empty place"),
        ({"device": "cpu", "devices": "cpu,cpu"}, "`device` cpu is that of all groups"),
    ],
)
def test_numbers_and_devices_that_do_not_fit_are_refused(
    options: dict[str, object], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        replace(TrainerConfig(), **options)


def test_a_device_is_shared_by_those_that_have_it() -> None:
    assert TrainerConfig().group_devices == ("auto",)
    assert TrainerConfig(groups=2, device="cpu").sharing == 2
    config = TrainerConfig(devices="cuda:0, cuda:1")
    assert config.group_devices == ("cuda:0", "cuda:1")
    assert replace(config, device="cuda:1", devices="", groups=1).sharing == 1

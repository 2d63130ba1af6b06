"""Which jobs the calls of several runs become, counted by a real engine that has no model."""

import asyncio
import secrets
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_store import CheckpointStore
from mint_core.errors import FailedPrecondition, TrainingRunNotFound
from mint_core.rpc.quotas import QuotaExceeded
from mintrpc.v1 import trainer_pb2
from tests.unit.trainer_service.calls import call
from tests.unit.trainer_service.fronts import TENANT, backward, fronting, optim_step
from trainer_service.calls import Load, Save
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.jobs import CreateRow, DropRow, SaveRow
from trainer_service.journal import writer
from trainer_service.journal.schema import DATABASE
from trainer_service.journal.writer import JournalFailed, RecordRefused
from trainer_service.run.run import Run
from trainer_service.wire.requests import CreateRun, Identity, OpenRun, UpdateRun
from trainer_service.wire.responses import update_response


def job_of(answer: Any) -> float:
    """Number of the engine's job that ended a call."""
    if isinstance(answer, trainer_pb2.OptimStepResponse):
        return float(answer.metrics["grad_norm:mean"])
    return float(np.frombuffer(answer.outputs[-1].logprobs.values, "<f4")[-1])


async def test_steps_of_runs_that_shared_a_plan_go_together_before_the_next(
    tmp_path: Path,
) -> None:
    """And answers leave as soon as a run's own work is done."""
    async with fronting(tmp_path) as front:
        heavy, *small = [await front.create() for _ in range(4)]
        flood = front.submit(backward(heavy, 1, [30] * 200))  # longer than the disk takes
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


async def test_a_step_looks_at_no_run_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are that nobody calls."""
    looked, own = set[str](), Run.__getattribute__

    def noting(run: Run, name: str) -> Any:
        looked.add(own(run, "origin").training_run_id)
        return own(run, name)

    async with fronting(tmp_path, snapshot_s=1000.0) as front:
        for _ in range(20):
            await front.create()
        busy = await front.create()
        watching = front.runs.watch(TENANT, busy)
        await anext(watching)
        monkeypatch.setattr(Run, "__getattribute__", noting)
        for sequence in (1, 3):
            await front.submit(backward(busy, sequence, [8, 30]))
            await front.submit(optim_step(busy, sequence + 1))
            await anext(watching)
        monkeypatch.undo()
        await watching.aclose()

    assert looked == {busy}


async def test_when_the_journal_has_failed_all_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who wait, those who ask again, and those who come."""

    def surprise(name: str) -> None:
        raise MemoryError("no memory")

    async with fronting(tmp_path) as front:
        run = await front.create()
        front.scheduler.hold()
        waiting = front.submit(backward(run, 1, [8]))
        while not front.run(run).numbers.in_flight:
            await asyncio.sleep(0)
        await front.service.journal.flush()
        monkeypatch.setattr(writer, "fault_point", surprise)
        with pytest.raises(JournalFailed):
            await front.service.journal.flush()

        update = UpdateRun(training_run_id=run, identity=front.identity(), metadata={})
        for each in (
            waiting,
            front.submit(backward(run, 1, [8])),
            front.submit(backward(run, 2, [8])),
            front.create(),
            front.delete(run),
            front.runs.update(TENANT, update),
            front.runs.open(TENANT, OpenRun(run, front.identity())),
        ):
            with pytest.raises(JournalFailed, match=r"no memory.*restart the server"):
                await each


async def test_a_save_is_on_disk_with_its_mark_before_the_store_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done again after a crash, it then finds what it has published."""
    seen: list[object] = []
    save = Checkpoints.save

    def saving(*arguments: Any, **options: Any) -> Any:
        with closing(sqlite3.connect(front.state / DATABASE)) as journal:
            seen.extend(journal.execute("SELECT mark FROM calls").fetchall())
        return save(*arguments, **options)

    def slow(name: str) -> None:
        time.sleep(0.05)

    async with fronting(tmp_path, engine_module="tests.engines.rows") as front:
        run = await front.create()
        monkeypatch.setattr(Checkpoints, "save", saving)
        monkeypatch.setattr(writer, "fault_point", slow)
        work = Save(kind="weights", name="a", overwrite=False, ttl_s=None, metadata={})
        made = call(1, run=run, method="SaveState", work=work)
        await front.submit(replace(made, mark="drawn"))

    assert seen == [("drawn",)]


async def test_a_deletion_that_fails_leaves_the_run_gone_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        kept = front.run(run)
        with monkeypatch.context() as patch:

            def fail(*args: object, **options: object) -> None:
                raise OSError("the store is away")

            patch.setattr(CheckpointStore, "delete_run", fail)
            with pytest.raises(OSError, match="away"):
                await front.delete(run)
            with pytest.raises(TrainingRunNotFound):
                front.run(run)
            await front.runs.expire()
            assert kept in front.service.table.all()

        await front.runs.expire()
        assert kept not in front.service.table.all()


async def test_a_quota_counts_the_runs_of_before_a_restart(tmp_path: Path) -> None:
    (tmp_path / "quotas").write_text("runs = 1")
    async with fronting(tmp_path / "store", quotas=tmp_path / "quotas") as front:
        run = await front.create()
    async with fronting(tmp_path / "store", quotas=tmp_path / "quotas") as front:
        front.identity()  # the one that the first run was created with
        with pytest.raises(QuotaExceeded, match="`runs`"):
            await front.create()
        await front.delete(run)
        await front.create()
        with pytest.raises(QuotaExceeded, match="`runs`"):
            await front.create()


async def test_a_deletion_asked_for_again_is_the_same(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run, identity = await front.create(), front.identity()
        await asyncio.gather(front.delete(run, identity), front.delete(run))
        await front.delete(run, identity)  # remembered
        with pytest.raises(TrainingRunNotFound):
            await front.delete(run)


async def test_a_run_that_could_not_be_saved_leaves_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fronting(tmp_path, engine_module="tests.engines.rows") as front:
        run = await front.create()
        save = Save(kind="weights", name="a", overwrite=False, ttl_s=None, metadata={})
        await front.submit(call(1, run=run, method="SaveState", work=save))
        jobs: list[object] = []
        real = front.scheduler.row

        async def watched(job: object, *args: Any, **options: Any) -> Any:
            jobs.append(job)
            if isinstance(job, SaveRow):
                raise FailedPrecondition("no disk")
            return await real(job, *args, **options)

        monkeypatch.setattr(front.scheduler, "row", watched)
        request = CreateRun(
            identity=front.identity(),
            source=Load(path=f"mint://{run}/weights/a", with_optimizer=True),
            metadata={},
            isolated=False,
        )
        with pytest.raises(FailedPrecondition, match="no disk"):
            await front.runs.create(TENANT, request)

        assert [type(job) for job in jobs] == [CreateRow, SaveRow, DropRow]
        assert len(list(front.service.table.all())) == 1


async def test_a_run_that_the_journal_refuses_leaves_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fronting(tmp_path) as front:
        first = await front.create()
        jobs: list[object] = []
        real = front.scheduler.row

        async def watched(job: object, *args: Any, **options: Any) -> Any:
            jobs.append(job)
            return await real(job, *args, **options)

        monkeypatch.setattr(front.scheduler, "row", watched)
        monkeypatch.setattr(secrets, "token_hex", lambda count: first.removeprefix("run-"))
        with pytest.raises(RecordRefused):  # the id is taken
            await front.create()

        assert [type(job) for job in jobs] == [CreateRow, DropRow]
        assert len(list(front.service.table.all())) == 1


LARGE = {"a": "x" * 16_000}


async def test_of_a_request_little_is_remembered_and_the_same_is_answered(tmp_path: Path) -> None:
    async with fronting(tmp_path) as front:
        run = await front.create()
        update = UpdateRun(training_run_id=run, identity=front.identity(), metadata=LARGE)
        opening = OpenRun(run, front.identity())
        answers = [await front.runs.update(TENANT, update), await front.runs.open(TENANT, opening)]
        assert [await front.runs.update(TENANT, update)] == answers[:1]
    answered = trainer_pb2.UpdateTrainingRunResponse.FromString(answers[0]).training_run
    assert (answered.metadata, answered.training_run_id) == (LARGE, run)
    assert answered.lora_config.rank == 1

    with closing(sqlite3.connect(front.state / DATABASE)) as journal:
        sizes = journal.execute("SELECT length(answer) + length(hash) FROM requests").fetchall()
    assert len(sizes) == 3
    assert max(size for (size,) in sizes) < 400
    async with fronting(tmp_path) as front:  # again, after a restart
        again = [await front.runs.update(TENANT, update), await front.runs.open(TENANT, opening)]
        assert again == answers

        other = UpdateRun(training_run_id=run, identity=Identity("other", b""), metadata={})
        await front.runs.update(TENANT, other)
        assert await front.runs.update(TENANT, update) == answers[0]
        assert front.runs.get(TENANT, run).metadata == {}


async def test_answers_that_were_remembered_whole_are_given_as_they_were(tmp_path: Path) -> None:
    """As earlier versions did."""
    async with fronting(tmp_path) as front:
        run = await front.create()
        update = UpdateRun(training_run_id=run, identity=front.identity(), metadata={"a": "b"})
        await front.runs.update(TENANT, update)
        view = front.runs.get(TENANT, run)
    whole = update_response(replace(view, metadata={"then": "this"}))
    with closing(sqlite3.connect(front.state / DATABASE)) as journal, journal:
        journal.execute(
            "UPDATE requests SET answer = ? WHERE request_id = ?",
            (whole, update.identity.request_id),
        )

    async with fronting(tmp_path) as front:
        assert await front.runs.update(TENANT, update) == whole
        await front.delete(run, Identity("deletion", b""))
        assert await front.runs.update(TENANT, update) == whole

"""What accepted calls do. Each is a task of its own, whatever becomes of the RPC."""

import asyncio
import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mint_core.errors import EngineDied, EngineFault, MintError, ResourceExhausted
from mint_core.rpc.errors import domain_error
from mint_core.rpc.metrics import Metrics
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.jobs import ClearGradient, ExportRow, LoadRow, StepRow, TileResult, tile_tokens
from trainer_service.journal.ledger import effect_of
from trainer_service.journal.records import Effect, SnapshotRecord
from trainer_service.queue.backlog import Backlogs
from trainer_service.queue.planner import DEATHS_UNTIL_ALONE, cut
from trainer_service.queue.scheduler import NotStarted, Scheduler
from trainer_service.recovery.durability import Durability
from trainer_service.run.calls import (
    Call,
    Compute,
    Computed,
    Discard,
    Discarded,
    Load,
    Loaded,
    Outcome,
    Refused,
    Save,
    Saved,
    SaveForSampler,
    Step,
    Stepped,
)
from trainer_service.run.run import Run
from trainer_service.run.turns import Turn

logger = logging.getLogger(__name__)


class Execution:
    """Runs accepted calls in their run's order and records their outcomes."""

    def __init__(
        self,
        scheduler: Scheduler,
        checkpoints: Checkpoints,
        metrics: Metrics,
        backlogs: Backlogs,
        durability: Durability,
    ) -> None:
        self._scheduler = scheduler
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._backlogs = backlogs
        self._ledger = durability.ledger
        self._recovery = durability.recovery
        self._snapshots = durability.snapshots
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, run: Run, call: Call) -> None:
        """Starts a call whose place in its run is settled."""
        self._ledger.accepted(run, call)
        self.start(run, call)

    def start(self, run: Run, call: Call) -> None:
        """Starts a call that the journal knows."""
        turn = run.turns.take(exclusive=call.exclusive)
        self._metrics.queue_depth.inc()
        self._backlogs.enter(run.origin, call)
        task = asyncio.create_task(self._execute(run, call, turn))
        run.stir_watchers()  # who look when the task has begun
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Waits until no call is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        """Cancels what still runs: the journal has it, and it is done after the next start."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _execute(self, run: Run, call: Call, turn: Turn) -> None:
        """The next call of the run goes on as soon as this one has an outcome; its caller is told
        when that is on disk.
        """
        accepted_s = time.monotonic()
        async with turn:
            started_s = time.monotonic()
            done = await self._lasting(run, call)
            call.course.wait_s = started_s - accepted_s
            call.course.run_s = time.monotonic() - started_s
            run.settle(call, done.outcome)
            self._ledger.ended(
                run,
                call,
                done.outcome,
                snapshot=done.snapshot,
                then=lambda: self._answer(run, call, done),
            )
            if effect_of(call, done.outcome) in (Effect.ADD, Effect.STEP):
                stepped = call.method == "OptimStep"
                run.exposure.change(len(call.payload), stepped=stepped)
                await self._snapshots.after(run, stepped=stepped)

    def _answer(self, run: Run, call: Call, done: "_Done") -> None:
        self._metrics.queue_depth.dec()
        self._backlogs.leave(run.origin, call)
        if done.snapshot is not None:
            self._snapshots.replaced(run, done.snapshot)
        run.answer(call, done.outcome)

    async def _lasting(self, run: Run, call: Call) -> "_Done":
        """What a call comes to. What an engine has done that is gone is done again by the next."""
        presence = run.presence
        try:
            with presence.execution():
                while (done := await self._attempt(run, call)) is None:
                    pass
                return done
        finally:
            self._recovery.consider(run)  # others may have waited for this one

    async def _attempt(self, run: Run, call: Call) -> "_Done | None":
        """Does a call; None: an engine ended, and what it did is to be done again."""
        try:
            run.check_usable()
            if not (isinstance(call.work, Refused) and call.method != "OptimStep"):
                await self._recovery.present(run, call.place.sequence)
            life = self._scheduler.life
            done = await self._perform(run, call)
        except NotStarted:
            return None
        except EngineDied as death:
            return self._note_death(run, call, death)
        except Exception as raised:
            return await self._fail(run, call, _final(domain_error(raised)))
        return done if life == self._scheduler.life or isinstance(done.outcome, Saved) else None

    def _note_death(self, run: Run, call: Call, death: EngineDied) -> "_Done | None":
        """Gives a call up with which engine after engine has died, at last without neighbours."""
        self._ledger.died(run, call)
        call.course.deaths += 1
        if call.course.deaths <= DEATHS_UNTIL_ALONE:
            return None
        logger.error("run=%s sequence=%d ends engines", run.id, call.place.sequence)
        return _Done(
            EngineFault(
                f"{call.course.deaths} engines ended while they worked on this call, the last of "
                f"them on nothing else ({death.message}); it is not tried again: the server's log "
                "says why, and if memory was short, shorter sequences or fewer per call may do",
                engine_deaths=call.course.deaths,
            )
        )

    async def _fail(self, run: Run, call: Call, error: MintError) -> "_Done | None":
        """The gradient is cleared after a step that was not taken."""
        if call.method == "OptimStep" and run.gradient.touched:
            try:
                await self._scheduler.row(ClearGradient(run.id), run.presence.life)
            except EngineDied:
                return None
            except MintError:
                run.presence.leave()  # the row is not what it should be: it is restored
        return _Done(error)

    async def _perform(self, run: Run, call: Call) -> "_Done":
        match call.work:
            case Refused(error):
                raise error
            case Compute() as compute:
                return _Done(await self._compute(run, call, compute))
            case Step() as step:
                return _Done(await self._step(run, call, step))
            case Discard():
                return _Done(await self._discard(run))
            case Save() | SaveForSampler() as save:
                return _Done(await self._save(run, call, save))
            case Load() as load:
                return await self._load(run, call, load)

    async def _compute(self, run: Run, call: Call, compute: Compute) -> Computed:
        most_tokens = min(run.origin.tile_tokens, self._scheduler.max_batch_tokens)
        tiles = cut(call, compute, most_tokens, isolated=run.origin.isolated)
        results = await self._scheduler.compute(run.origin.tenant, tiles)
        for result in results:
            if result.error is not None:
                raise result.error
        return Computed(
            logprobs=tuple(logprobs for result in results for logprobs in result.logprobs),
            metrics=merge_metrics(results, [tile_tokens(tile) for tile in tiles]),
        )

    async def _step(self, run: Run, call: Call, step: Step) -> Stepped:
        if refusal := run.gradient.refusal(step.backward_count):
            raise refusal
        job = StepRow(run.id, step.adam_params, alone=call.course.deaths >= DEATHS_UNTIL_ALONE)
        result = await self._scheduler.step(run.origin.tenant, job)
        return Stepped(
            step=result.step,
            metrics={
                "grad_norm:mean": result.grad_norm,
                "learning_rate:mean": step.adam_params.learning_rate,
            },
            weight_digest=result.weight_digest,
        )

    async def _discard(self, run: Run) -> Discarded:
        if run.gradient.touched:
            await self._scheduler.row(ClearGradient(run.id), run.presence.life)
        return Discarded(run.gradient.pending)

    async def _save(self, run: Run, call: Call, save: Save | SaveForSampler) -> Saved:
        row = partial(self._scheduler.row, life=run.presence.life)
        sequence = call.place.sequence
        if isinstance(save, Save):
            arrays = await row(ExportRow(run.id, with_optimizer=True))
            published = await self._checkpoints.publish_state(run.origin, arrays, save, sequence)
        else:
            published = await self._checkpoints.publish_adapter(
                run.origin, save, row, step=run.step, sequence=sequence
            )
        return Saved(
            path=published.path,
            revision_path=published.revision_path,
            step=published.manifest.step,
            gradient_pending=run.gradient.pending,
        )

    async def _load(self, run: Run, call: Call, load: Load) -> "_Done":
        """The loaded row is on disk, apart from its checkpoint, before the call is answered."""
        checkpoint = await self._checkpoints.open(load, run.origin.tenant)
        checkpoint.check_fits(run.origin)
        arrays = await checkpoint.arrays()
        try:
            await self._scheduler.row(LoadRow(run.id, arrays), run.presence.life)
            snapshot = await self._snapshots.take(run, call.place.sequence)
        except MintError:
            run.presence.leave()  # half loaded: it is restored as it was before
            raise
        return _Done(
            Loaded(
                step=arrays.step,
                revision_path=checkpoint.revision_path,
                gradient_discarded=run.gradient.pending,
            ),
            snapshot,
        )


@dataclass(frozen=True, slots=True)
class _Done:
    outcome: Outcome
    snapshot: SnapshotRecord | None = None  # of what the call has made of the row


def merge_metrics(results: Sequence[TileResult], tokens: Sequence[int]) -> Mapping[str, float]:
    """Joins the metrics of a call's tiles as their suffixes say; means count by tokens."""
    merged: dict[str, float] = {}
    for name in results[0].metrics:
        values = [result.metrics[name] for result in results]
        match name.rpartition(":")[2]:
            case "sum":
                merged[name] = sum(values)
            case "min":
                merged[name] = min(values)
            case "max":
                merged[name] = max(values)
            case "mean":
                weighted = sum(value * count for value, count in zip(values, tokens, strict=True))
                merged[name] = weighted / sum(tokens)
            case suffix:
                raise AssertionError(f"metric {name} has the unknown suffix {suffix}")
    return merged


def _final(error: MintError) -> MintError:
    """The error without a wish to send again: an accepted call has used up its number."""
    if isinstance(error, ResourceExhausted) and error.retry_after_s is not None:
        error = copy.copy(error)
        error.retry_after_s = None
    return error

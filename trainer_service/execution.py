"""What accepted calls do. Each is a task of its own, whatever becomes of the RPC."""

import asyncio
import copy
import time
from collections.abc import Mapping, Sequence

from mint_core.errors import MintError, ResourceExhausted
from mint_core.rpc.errors import domain_error
from mint_core.rpc.metrics import Metrics
from trainer_service.backlog import Backlogs
from trainer_service.calls import (
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
from trainer_service.checkpoints import Checkpoints
from trainer_service.jobs import ClearGradient, ExportRow, LoadRow, StepRow, TileResult, tile_tokens
from trainer_service.planner import cut
from trainer_service.run import Run
from trainer_service.scheduler import Scheduler
from trainer_service.turns import Turn


class Execution:
    """Runs accepted calls in their run's order and records their outcomes."""

    def __init__(
        self,
        scheduler: Scheduler,
        checkpoints: Checkpoints,
        metrics: Metrics,
        backlogs: Backlogs,
    ) -> None:
        self._scheduler = scheduler
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._backlogs = backlogs
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, run: Run, call: Call) -> None:
        """Starts a call whose place in its run is settled."""
        turn = run.turns.take(exclusive=call.exclusive)
        self._metrics.queue_depth.inc()
        self._backlogs.enter(run.origin, call)
        task = asyncio.create_task(self._execute(run, call, turn))
        run.stir_watchers()  # who look when the task has begun
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancels what still runs."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _execute(self, run: Run, call: Call, turn: Turn) -> None:
        accepted_s = time.monotonic()
        try:
            async with turn:
                started_s = time.monotonic()
                outcome = await self._outcome(run, call)
                call.timing.wait_s = started_s - accepted_s
                call.timing.run_s = time.monotonic() - started_s
                run.end(call, outcome)
        finally:
            self._metrics.queue_depth.dec()
            self._backlogs.leave(run.origin, call)

    async def _outcome(self, run: Run, call: Call) -> Outcome:
        try:
            run.check_usable()
            outcome = await self._perform(run, call)
        except Exception as raised:
            await self._fail(run, call)
            return _final(domain_error(raised))
        if call.method == "ForwardBackward":
            run.gradient.add()
        return outcome

    async def _fail(self, run: Run, call: Call) -> None:
        """Keeps the gradient's rules: incomplete after a backward, cleared after a step."""
        if call.method == "ForwardBackward":
            run.gradient.fail(call.place.sequence)
        elif call.method == "OptimStep":
            try:
                run.check_usable()
                await self._clear_gradient(run)
            except MintError:
                pass  # the run is lost, its gradient too

    async def _perform(self, run: Run, call: Call) -> Outcome:
        match call.work:
            case Refused(error):
                raise error
            case Compute() as compute:
                return await self._compute(run, call, compute)
            case Step() as step:
                return await self._step(run, step)
            case Discard():
                return Discarded(await self._clear_gradient(run))
            case Save() | SaveForSampler() as save:
                return await self._save(run, save)
            case Load() as load:
                return await self._load(run, load)

    async def _compute(self, run: Run, call: Call, compute: Compute) -> Computed:
        tiles = cut(call, compute, self._scheduler.max_batch_tokens, isolated=run.origin.isolated)
        results = await self._scheduler.compute(run.origin.tenant, tiles)
        for result in results:
            if result.error is not None:
                raise result.error
        return Computed(
            logprobs=tuple(logprobs for result in results for logprobs in result.logprobs),
            metrics=merge_metrics(results, [tile_tokens(tile) for tile in tiles]),
        )

    async def _step(self, run: Run, step: Step) -> Stepped:
        if refusal := run.gradient.refusal(step.backward_count):
            raise refusal
        result = await self._scheduler.step(run.origin.tenant, StepRow(run.id, step.adam_params))
        run.gradient.clear()
        run.step = result.step
        return Stepped(
            step=result.step,
            metrics={
                "grad_norm:mean": result.grad_norm,
                "learning_rate:mean": step.adam_params.learning_rate,
            },
        )

    async def _clear_gradient(self, run: Run) -> bool:
        pending = run.gradient.pending
        if run.gradient.touched:
            await self._scheduler.row(ClearGradient(run.id))
            run.gradient.clear()
        return pending

    async def _save(self, run: Run, save: Save | SaveForSampler) -> Saved:
        if isinstance(save, Save):
            arrays = await self._scheduler.row(ExportRow(run.id, with_optimizer=True))
            published = await self._checkpoints.publish_state(run.origin, arrays, save)
        else:
            write = self._scheduler.row
            published = await self._checkpoints.publish_adapter(run.origin, save, write)
        return Saved(
            path=published.path,
            revision_path=published.revision_path,
            step=published.manifest.step,
            gradient_pending=run.gradient.pending,
        )

    async def _load(self, run: Run, load: Load) -> Loaded:
        checkpoint = await self._checkpoints.open(load, run.origin.tenant)
        checkpoint.check_fits(run.origin)
        arrays = await checkpoint.arrays()
        run.check_usable()  # reading took a while
        pending = run.gradient.pending
        run.gradient.clear()
        await self._scheduler.row(LoadRow(run.id, arrays))
        run.step = arrays.step
        return Loaded(
            step=arrays.step,
            revision_path=checkpoint.revision_path,
            gradient_discarded=pending,
        )


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

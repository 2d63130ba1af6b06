"""What calls do, and what they come to."""

import copy
import time
from functools import partial

from mint_core.errors import EngineDied, EngineFault, MintError, ResourceExhausted
from mint_core.rpc.errors import domain_error
from trainer_service import calls, jobs
from trainer_service.queue.planner import DEATHS_UNTIL_ALONE, cut
from trainer_service.run.run import Run, UnsavedWork
from trainer_service.run.services import RunServices
from trainer_service.wire import replies


class Execution:
    """Of one run's calls. Whether they may run now is for the run's loop to know."""

    def __init__(self, run: Run, services: RunServices) -> None:
        self._run = run
        self._checkpoints = services.checkpoints
        self._saved_rows = services.saved_rows
        self._groups = services.groups

    async def attempt(self, call: calls.Call) -> calls.Outcome | EngineDied:
        """Does a call. Returns what it has come to, or the death of the engine that was at it."""
        course = call.course
        started_s = time.monotonic()
        course.wait_s = course.wait_s or started_s - course.accepted_s
        try:
            self._run.check_usable()
            return await self._perform(call)
        except Exception as raised:
            error = domain_error(raised)
            if isinstance(error, EngineFault):
                self._run.row_life = 0  # nobody knows what it holds: it is restored
            return error if isinstance(error, EngineDied) else await self._fail(call, error)
        finally:
            course.run_s = time.monotonic() - started_s

    async def _fail(self, call: calls.Call, error: MintError) -> calls.Outcome | EngineDied:
        """The gradient is cleared after a step that was not taken."""
        run, gradient = self._run, self._run.state.gradient
        if call.method == "OptimStep" and gradient.touched and run.row_life and not run.lost:
            try:
                await self._row(jobs.ClearGradient(self._run.id))
            except EngineDied as death:
                return death
            except MintError:
                self._run.row_life = 0  # it is not what it should be: it is restored
        return refusal(call, error)

    async def _row(self, job: object) -> None:
        await self._run.group.scheduler.row(job, self._run.row_life)

    async def _perform(self, call: calls.Call) -> calls.Outcome:
        match call.work:
            case calls.Refused(error):
                raise error
            case calls.Compute() as compute:
                return await self._compute(call, compute)
            case calls.Step() as step:
                return await self._step(call, step)
            case calls.Discard():
                return await self._discard()
            case calls.Save() as save:
                return await self._save(call, save)
            case calls.Load() as load:
                return await self._load(call, load)

    async def _compute(self, call: calls.Call, compute: calls.Compute) -> calls.Outcome:
        run, scheduler = self._run, self._run.group.scheduler
        tiles = cut(
            compute,
            min(run.origin.tile_tokens, scheduler.max_batch_tokens),
            training_run_id=run.id,
            sequence=call.place.sequence,
            isolated=run.origin.isolated,
            deaths=call.course.deaths,
        )
        results, seconds = await scheduler.compute(run.origin.tenant, tiles, run.row_life)
        run.unsaved.seconds += seconds
        for result in results:
            if result.error is not None:
                raise result.error
        metrics = {
            name: sum(result.metrics[name] for result in results) for name in results[0].metrics
        }
        logprobs = [each for result in results for each in result.logprobs]
        return calls.Outcome(
            make_reply=partial(
                replies.computed, logprobs, metrics, backward=call.method == "ForwardBackward"
            ),
            effect=calls.Effect.ADD if compute.backward else calls.Effect.NONE,
            metrics=metrics,
        )

    async def _step(self, call: calls.Call, step: calls.Step) -> calls.Outcome:
        run = self._run
        if refused := run.state.gradient.refusal(step.backward_count):
            raise refused
        alone = call.course.deaths >= DEATHS_UNTIL_ALONE
        job = jobs.StepRow(run.id, step.adam_params, alone=alone)
        result = await run.group.scheduler.step(run.origin.tenant, job, run.row_life)
        rate = step.adam_params.learning_rate
        metrics = {"grad_norm:mean": result.grad_norm, "learning_rate:mean": rate}
        return calls.Outcome(
            make_reply=partial(replies.stepped, result.step, metrics),
            effect=calls.Effect.STEP,
            step=result.step,
            digest=result.weight_digest,
            metrics=metrics,
        )

    async def _discard(self) -> calls.Outcome:
        gradient = self._run.state.gradient
        if gradient.touched:
            await self._row(jobs.ClearGradient(self._run.id))
        return calls.Outcome(
            make_reply=partial(replies.discarded, gradient.pending), effect=calls.Effect.CLEAR
        )

    async def _save(self, call: calls.Call, save: calls.Save) -> calls.Outcome:
        run = self._run
        if call.mark and call.course.noted is not None:
            await call.course.noted  # the store is touched only when the mark is on disk
        write = partial(run.group.scheduler.row, life=run.row_life)
        published = await self._checkpoints.save(run.origin, save, call, write, step=run.state.step)
        reply = partial(replies.saved, published, gradient_pending=run.state.gradient.pending)
        return calls.Outcome(make_reply=reply)

    async def _load(self, call: calls.Call, load: calls.Load) -> calls.Outcome:
        """The loaded row is on disk, apart from its checkpoint, before the call is answered."""
        run = self._run
        checkpoint = await self._checkpoints.open(load, run.origin.tenant)
        checkpoint.check_fits(run.origin, self._groups.model)
        source = checkpoint.source
        try:
            await self._row(jobs.LoadRow(run.id, source))
            sequence = call.place.sequence
            saved_row = await self._saved_rows.take(run.group, run.id, sequence, run.row_life)
            run.unsaved = UnsavedWork()
        except MintError:
            run.row_life = 0  # half loaded: it is restored as it was before
            raise
        return calls.Outcome(
            make_reply=partial(
                replies.loaded,
                checkpoint.revision_path,
                source.step,
                gradient_discarded=run.state.gradient.pending,
            ),
            step=source.step,
            saved_row=saved_row,
        )


def refusal(call: calls.Call, error: MintError) -> calls.Outcome:
    """The outcome of a call that failed, without a wish to send it again: its number is used up."""
    if isinstance(error, ResourceExhausted) and error.retry_after_s is not None:
        error = copy.copy(error)
        error.retry_after_s = None
    return calls.Outcome(
        make_reply=partial(replies.refused, error, call.place.sequence),
        effect=calls.Effect.CLEAR if call.method == "OptimStep" else calls.Effect.NONE,
        error=error,
    )

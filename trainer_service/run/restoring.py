"""Bringing a run's row back after the engine that had it is gone: its newest saved row, and behind
it the calls that have changed it, in their order, beside whatever else the engine computes.

Calls are cut as they were, so that where a row's bits do not depend on who shares its passes, every
bit comes back. Each step's digest is compared: a difference is told.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from mint_core.errors import EngineDied, EngineFault, MintError
from mint_core.fault_points import fault_point
from trainer_service import jobs
from trainer_service.calls import Compute, Effect, Step
from trainer_service.errors import LossNotFinite, StateDamaged
from trainer_service.journal.records import PastCall
from trainer_service.journal.run_journal import Past
from trainer_service.queue.planner import DEATHS_UNTIL_ALONE, cut
from trainer_service.queue.scheduler import NotStarted
from trainer_service.run.run import Run
from trainer_service.run.services import RunServices

logger = logging.getLogger(__name__)

MOST_DEATHS = 3  # of engines that did the same again, until its run is given up
_BESIDE = 16  # backwards that are read and handed in together
_ANY_LENGTH = 2**31  # context of a model that had more memory when a call was accepted
_ROW = 0  # for a call's sequence: the row itself, as it was saved or created

W = TypeVar("W", Compute, Step)


class Restoring:
    """Of one run. `restore` is called by its loop when nothing of the run is under way."""

    def __init__(self, run: Run, services: RunServices) -> None:
        self._run = run
        self._services = services
        self._deaths: dict[int, int] = {}  # of engines, by the sequence of what they did again
        self._differs = False

    async def restore(self) -> None:
        """Brings the row where it was. Raises EngineDied when that ends the engine, else why it
        cannot be; a run that cannot be restored is lost.
        """
        run, started_s = self._run, time.monotonic()
        self._differs = False
        try:
            life = await self._services.groups.home(run)
            async with self._services.restorations.turn(run.origin.tenant):
                past = await run.journal.past()
                await self._counting(_ROW, self._begin(past, life))
                await self._replay(past, life)
        except StateDamaged as error:
            logger.error("run=%s cannot be restored: %s", run.id, error.message)
            run.lose(error.why)
            raise
        fault_point("recovery:restored")
        run.row_life = life
        self._deaths.clear()
        self._services.rows_restored.inc()
        elapsed_s = time.monotonic() - started_s
        logger.info("run=%s restored calls=%d s=%.2f", run.id, len(past.calls), elapsed_s)

    async def _begin(self, past: Past, life: int) -> None:
        """Makes the row as it was when it was saved, or when it was created."""
        run, row = self._run, past.saved_row
        spec = run.origin.spec
        job = jobs.RestoreRow(run.id, spec, row.file) if row else jobs.CreateRow(run.id, spec)
        scheduler = run.group.scheduler
        await scheduler.row(jobs.DropRow(run.id), life)
        differs = await scheduler.row(job, life)
        if row is None or not differs:
            return
        if not self._services.groups.alike:
            self._tell_inexact(
                f"it goes on in {run.group.name}, where numbers may have other last bits: {differs}"
            )
        elif past.calls:
            logger.warning("run=%s may not replay exactly: %s", run.id, differs)

    async def _replay(self, past: Past, life: int) -> None:
        adding: list[Coroutine[Any, Any, None]] = []
        for call in past.calls:
            if call.effect is not Effect.ADD or len(adding) == _BESIDE:
                await _all(adding)
                adding = []
            match call.effect:
                case Effect.ADD:
                    work = await self._work(call, Compute)
                    adding.append(self._counting(call.sequence, self._add(call, work, life)))
                case Effect.STEP:
                    step = await self._work(call, Step)
                    await self._counting(call.sequence, self._step(call, step, life))
                case Effect.CLEAR:
                    await self._run.group.scheduler.row(jobs.ClearGradient(self._run.id), life)
        await _all(adding)

    async def _work(self, call: PastCall, kind: type[W]) -> W:
        model = replace(self._services.groups.model, context_length=_ANY_LENGTH)
        work = await self._run.journal.work(call.sequence, model, self._services.decoders)
        if not isinstance(work, kind):
            raise StateDamaged(self._run.id, f"the journal garbles what call {call.sequence} asked")
        return work

    async def _add(self, call: PastCall, compute: Compute, life: int) -> None:
        run, scheduler = self._run, self._run.group.scheduler
        tiles = cut(
            compute,
            min(run.origin.tile_tokens, scheduler.max_batch_tokens),
            training_run_id=run.id,
            sequence=call.sequence,
            isolated=run.origin.isolated,
            deaths=self._deaths.get(call.sequence, 0),
        )
        tenant = run.origin.tenant
        results, seconds = await scheduler.compute(tenant, tiles, life, billed=False)
        run.unsaved.seconds += seconds
        for result in results:
            # What an earlier version answered with NaN has its NaN in the gradient again.
            if result.error is not None and not isinstance(result.error, LossNotFinite):
                raise result.error

    async def _step(self, call: PastCall, step: Step, life: int) -> None:
        run = self._run
        alone = self._deaths.get(call.sequence, 0) >= DEATHS_UNTIL_ALONE
        job = jobs.StepRow(run.id, step.adam_params, alone=alone, replayed=True)
        result = await run.group.scheduler.step(run.origin.tenant, job, life, billed=False)
        if result.weight_digest == call.digest or self._differs:
            return
        logger.error(
            "run=%s sequence=%d step=%d replayed inexactly digest=%016x expected=%016x",
            *(run.id, call.sequence, result.step, result.weight_digest, call.digest or 0),
        )
        self._tell_inexact(
            f"the engine was replaced, and the weights that it computed again for step "
            f"{result.step} are not to the bit those of before"
        )

    def _tell_inexact(self, why: str) -> None:
        self._differs = True
        self._run.replayed_inexactly(why)
        self._services.inexact_replays.inc()

    async def _counting(self, doing: int, work: Awaitable[None]) -> None:
        """Gives the run up with which engine after engine ends at the same."""
        try:
            await work
        except NotStarted:
            raise
        except EngineFault as fault:
            self._deaths[doing] = self._deaths.get(doing, 0) + 1
            if not isinstance(fault, EngineDied):
                raise StateDamaged(self._run.id, f"its replay failed: {fault.message}") from fault
            if self._deaths[doing] < MOST_DEATHS:
                raise
            why = f"its replay ended {MOST_DEATHS} engines"
            raise StateDamaged(self._run.id, why) from fault


async def _all(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Does them beside each other, begun in order, and raises what counts most when all have
    ended.
    """
    ended = await asyncio.gather(*works, return_exceptions=True)
    errors = [each for each in ended if isinstance(each, BaseException)]
    if errors:
        raise min(errors, key=_weight)


def _weight(error: BaseException) -> int:
    kinds: Sequence[type[BaseException]] = (StateDamaged, NotStarted, EngineDied, MintError)
    return next((place for place, kind in enumerate(kinds) if isinstance(error, kind)), -1)

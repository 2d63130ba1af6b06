"""Doing again, in the same passes, what an engine had done to rows since their snapshots.

A pass may have been shared with runs whose rows are not to be restored now, or are already further:
where that can change numbers, their tiles are computed too, on rows made for it and dropped.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mint_core.errors import EngineDied, MintError
from trainer_service.errors import StateDamaged
from trainer_service.jobs import (
    ClearGradient,
    CreateRow,
    DropRow,
    Plan,
    RestoredRow,
    RestoreRow,
    StepResult,
    StepRow,
    StepRows,
    Tile,
    TileResult,
    tile_tokens,
)
from trainer_service.journal.ledger import Ledger, Past
from trainer_service.journal.records import Effect, PastCall, TileRecord
from trainer_service.queue.scheduler import Scheduler
from trainer_service.recovery.replay_order import Again, Finished, Incomplete, Pass, replay_order
from trainer_service.run.calls import Compute, Step
from trainer_service.run.presence import Doing
from trainer_service.run.run import Run

logger = logging.getLogger(__name__)

_ANY_LENGTH = 2**31  # context of a model that had more memory when a call was accepted


class Replay:
    """Restores rows of some runs in one life of the engine. Raises EngineDied when that ends."""

    def __init__(
        self,
        scheduler: Scheduler,
        ledger: Ledger,
        folder: Path,  # of snapshots
        life: int,
        done: Callable[[Run, MintError | None], None],  # of each run: its row is there, or why not
    ) -> None:
        self._scheduler = scheduler
        self._ledger = ledger
        self._folder = folder
        self._life = life
        self._done = done
        self._runs: dict[int, Run] = {}  # that are under way, by number
        self._computes: dict[tuple[int, int], Compute] = {}  # read lately
        self._differing: set[str] = set()
        self.doing: Doing | None = None  # with which the engine is busy
        self.runs_doing: Sequence[Run] = ()  # for which it is

    async def restore(self, runs: Sequence[Run]) -> None:
        """Brings the rows of the runs where they were."""
        pasts, plans = await self._ledger.pasts(runs)
        for run in runs:
            await self._attempt(run, ("begin", 0), self._begin(run, pasts[run.id]))
        calls = {number: pasts[run.id].calls for number, run in self._runs.items()}
        for item in replay_order(calls, plans):
            if isinstance(item, Pass):
                await self._pass(item)
            elif item.run in self._runs:
                await self._do(self._runs[item.run], item)

    async def _do(self, run: Run, item: Again | Finished | Incomplete) -> None:
        match item:
            case Again(_, call):
                await self._attempt(run, ("call", call.sequence), self._again(run, call))
            case Finished():
                del self._runs[item.run]
                self._done(run, None)
            case Incomplete(_, sequence):
                why = f"the journal lacks how its call {sequence} was computed"
                self._give_up(run, StateDamaged(run.id, why))

    async def _attempt(self, run: Run, doing: Doing, work: Awaitable[None]) -> None:
        """Goes on without a run that cannot be restored."""
        self.doing, self.runs_doing = doing, [run]
        try:
            await work
        except EngineDied:
            raise
        except MintError as error:
            self._give_up(run, error)
        self.doing = None

    def _give_up(self, run: Run, error: MintError) -> None:
        logger.error("run=%s cannot be restored: %s", run.id, error.message)
        self._runs.pop(run.origin.number, None)
        self._done(run, error)

    async def _begin(self, run: Run, past: Past) -> None:
        """Makes the row as it was when its snapshot was taken, or when it was created."""
        job: object = CreateRow(training_run_id=run.id, request=run.origin.spec)
        if past.snapshot is not None:
            path = str(self._folder / past.snapshot.file)
            job = RestoreRow(run.id, run.origin.spec, path)
        await self._scheduler.row(DropRow(run.id), self._life)
        restored = await self._scheduler.row(job, self._life)
        if isinstance(restored, RestoredRow) and restored.differs and past.calls:
            logger.warning("run=%s may not replay exactly: %s", run.id, restored.differs)
        self._runs[run.origin.number] = run

    async def _again(self, run: Run, call: PastCall) -> None:
        if call.effect is Effect.CLEAR:
            await self._scheduler.row(ClearGradient(run.id), self._life)
            return
        work = await self._ledger.work(run.origin.number, call.sequence, self._scheduler.model)
        assert isinstance(work, Step)
        result: StepResult
        (result,) = await self._scheduler.replay(
            StepRows((StepRow(run.id, work.adam_params),)), self._life
        )
        if result.error is not None:
            raise result.error
        if result.weight_digest != call.digest and run.id not in self._differing:
            self._differing.add(run.id)
            self._note_difference(run, call, result)

    def _note_difference(self, run: Run, call: PastCall, result: StepResult) -> None:
        logger.error(
            "run=%s sequence=%d step=%d replayed inexactly digest=%016x expected=%016x",
            run.id,
            call.sequence,
            result.step,
            result.weight_digest,
            call.digest or 0,
        )
        run.replayed_inexactly(
            f"the engine was replaced, and the weights that it computed again for step "
            f"{result.step} are not to the bit those of before"
        )
        self._ledger.replayed_inexactly(run)

    async def _pass(self, item: Pass) -> None:
        """Computes a pass again. Tiles nobody wants are there for what they change in others."""
        wanted = [tile for tile in item.tiles if tile in item.wanted and tile.run in self._runs]
        if not wanted:
            return
        kept = item.tiles if self._ledger.shared_plans else wanted
        ghosts = sorted({tile.run for tile in kept if tile not in wanted})
        self.doing = ("pass", item.plan)
        self.runs_doing = [self._runs[tile.run] for tile in wanted]
        for number in ghosts:
            await self._make_ghost(number)
        tiles = [await self._tile(tile, ghost=tile not in wanted) for tile in kept]
        started_s = time.monotonic()
        results = await self._scheduler.replay(Plan(tuple(tiles)), self._life)
        self._count(wanted, kept, tiles, results, time.monotonic() - started_s)
        self.doing = None
        for number in ghosts:
            await self._scheduler.row(DropRow(_ghost(number)), self._life)

    def _count(
        self,
        wanted: Sequence[TileRecord],
        kept: Sequence[TileRecord],
        tiles: Sequence[Tile],
        results: Sequence[TileResult],
        elapsed_s: float,
    ) -> None:
        tokens = sum(map(tile_tokens, tiles))
        for record, tile, result in zip(kept, tiles, results, strict=True):
            run = self._runs.get(record.run)
            if record not in wanted or run is None:
                continue
            run.exposure.seconds += elapsed_s * tile_tokens(tile) / tokens
            if result.error is not None:
                self._give_up(run, result.error)

    async def _tile(self, record: TileRecord, *, ghost: bool) -> Tile:
        compute = await self._compute(record)
        return Tile(
            training_run_id=_ghost(record.run) if ghost else self._runs[record.run].id,
            sequence=record.sequence,
            index=record.tile,
            first=record.first,
            documents=compute.documents[record.first : record.first + record.documents],
            loss=compute.loss,
            backward=compute.backward,
            weighted_only=compute.weighted_only,
            isolated=not ghost and self._runs[record.run].origin.isolated,
        )

    async def _compute(self, record: TileRecord) -> Compute:
        """What a past call asked for; of each run the latest is kept, since it has more tiles."""
        key = (record.run, record.sequence)
        if key not in self._computes:
            for other in [other for other in self._computes if other[0] == record.run]:
                del self._computes[other]
            model = replace(self._scheduler.model, context_length=_ANY_LENGTH)
            work = await self._ledger.work(*key, model)
            assert isinstance(work, Compute)
            self._computes[key] = work
        return self._computes[key]

    async def _make_ghost(self, number: int) -> None:
        spec = await self._ledger.spec(number)
        job = CreateRow(training_run_id=_ghost(number), request=spec)
        await self._scheduler.row(DropRow(_ghost(number)), self._life)
        await self._scheduler.row(job, self._life)


def _ghost(number: int) -> str:
    """Name of the row that stands in for that of a run."""
    return f"ghost-{number}"

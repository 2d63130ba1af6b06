"""All runs: made, found, opened, listed, changed, deleted. Another tenant's is not found."""

import asyncio
import copy
import itertools
import logging
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from mint_core.errors import EngineDied, EngineFault, MintError, Unavailable
from mint_core.rpc.metrics import Metrics
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.checkpoints.uploaded_runs import is_uploaded
from trainer_service.errors import TrainingRunUploaded
from trainer_service.jobs import CreateRow, DropRow, Plan, RowDescription, TileResult, tile_tokens
from trainer_service.journal.ledger import PastRun
from trainer_service.journal.records import SnapshotRecord
from trainer_service.queue.backlog import Backlogs
from trainer_service.queue.planner import most_tile_tokens
from trainer_service.queue.scheduler import NotStarted, Scheduler
from trainer_service.queue.watching import Watch
from trainer_service.recovery.durability import Durability
from trainer_service.run.call_numbers import SequenceLimits
from trainer_service.run.calls import Call, Load, Outcome
from trainer_service.run.execution import Execution
from trainer_service.run.retention import EXPIRY_INTERVAL_S, Clock, Expiries, Retention
from trainer_service.run.run import Run, RunHooks, RunOrigin, RunState, RunView
from trainer_service.wire.idempotency import REMEMBERED_S, Once
from trainer_service.wire.requests import CreateRun, DeleteRun, Identity, OpenRun, UpdateRun

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 3  # at a row with which engines die
FINISHING_SHARE = 0.6  # of the time of a drain, for calls under way; the rest is for snapshots


class Runs:
    """The runs of this trainer. They outlive the process, and its engine: the journal has them."""

    def __init__(
        self,
        scheduler: Scheduler,
        checkpoints: Checkpoints,
        metrics: Metrics,
        limits: SequenceLimits,
        backlogs: Backlogs,
        durability: Durability,
        retention_s: float = math.inf,
        clock: Clock = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._checkpoints = checkpoints
        self._limits = limits
        self._backlogs = backlogs
        self._retention_s = retention_s
        self._clock = clock
        self._expiries = Expiries(metrics)
        self._durability = durability
        self._ledger = durability.ledger
        self._execution = Execution(scheduler, checkpoints, metrics, backlogs, durability)
        self._once = Once()
        self._runs: dict[str, Run] = {}  # oldest first
        self._draining: MintError | None = None
        self._hooks = RunHooks(
            accept=self._execution.accept,
            acknowledge=self._ledger.acknowledged,
            refusal=lambda origin, before: self._refusal() or backlogs.refusal(origin, before),
        )
        scheduler.on_progress = self._stir_watchers
        scheduler.on_pass = self._note_pass
        checkpoints.handoff.on_trouble = self._note_trouble
        durability.journal.on_failure = self._abandon
        self._unanswered = self._recall()
        self._resumed = False  # whether they have taken their turns
        self._numbers = itertools.count(self._ledger.next_number())

    def _recall(self) -> list[tuple[Run, PastRun]]:
        """Takes in what the journal knows. Returns the runs that have calls to be answered."""
        unanswered = []
        for past in self._ledger.load_runs():
            record = past.record
            retention = Retention(record.retention_s, self._clock)
            retention.resume(time.time() - record.state.update_time_s)
            run = self._run(past.origin, record.state, record.metadata, retention)
            past.bring_back(run)
            self._ledger.know(run)
            self._runs[run.id] = run
            unanswered.append((run, past))
        for tenant, identity, since_s, view in self._ledger.load_requests():
            self._once.recall(tenant, identity, since_s, view)
        self._durability.snapshots.keep(
            {run.id: past.file for run, past in unanswered if past.file is not None}
        )
        return unanswered

    def resume(self) -> None:
        """Goes on with the calls that were accepted before a restart, once there is a model."""
        unanswered, self._unanswered = self._unanswered, []
        self._resumed = True
        for run, past in unanswered:
            for call in past.unanswered(run, self._scheduler.model):
                self._execution.start(run, call)

    async def submit(self, tenant: str, call: Call) -> Outcome:
        """Brings a sequenced call to its run and returns its outcome, or raises it."""
        self._check_journal()
        run = self._find(tenant, call.place.training_run_id)
        arrival = run.sequence.arrive(call)
        try:
            outcome = await arrival.outcome
        finally:
            run.sequence.leave(arrival)
        if isinstance(outcome, MintError):
            raise copy.copy(outcome)  # repeats raise it too, each with a trace of its own
        return outcome

    async def create(self, tenant: str, request: CreateRun) -> RunView:
        return await self._once.run(tenant, request.identity, lambda: self._create(tenant, request))

    async def open(self, tenant: str, request: OpenRun) -> RunView:
        """Fences earlier writers, and waits for the calls they were promised."""
        return await self._once.run(tenant, request.identity, lambda: self._open(tenant, request))

    def get(self, tenant: str, training_run_id: str) -> RunView:
        return self._find(tenant, training_run_id).view()

    def views(self, tenant: str) -> list[RunView]:
        """The tenant's runs."""
        return [run.view() for run in self._runs.values() if run.origin.tenant == tenant]

    async def update(self, tenant: str, request: UpdateRun) -> RunView:
        return await self._once.run(tenant, request.identity, lambda: self._update(tenant, request))

    async def delete(self, tenant: str, request: DeleteRun) -> None:
        await self._once.run(tenant, request.identity, lambda: self._delete(tenant, request))

    def watch(self, tenant: str, training_run_id: str) -> Watch:
        run = self._find(tenant, training_run_id)
        return Watch(run, lambda: self._scheduler.forecast(tenant, training_run_id))

    def all(self) -> Iterable[Run]:
        return self._runs.values()

    def end_watches(self) -> None:
        """Sends watchers away, who would hold up the end of the service."""
        for run in self._runs.values():
            run.end_watches(Unavailable("the server is shutting down; watch again"))

    async def keep_expiring(self) -> None:
        """Deletes abandoned runs, now and then, until cancelled."""
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL_S)
            await self.expire()
            self._ledger.forget_requests(REMEMBERED_S)

    async def expire(self) -> None:
        """Deletes the runs that nobody has called for their retention time. What has a name in
        the store stays.
        """
        for run in [run for run in self._runs.values() if run.abandoned]:
            if not run.abandoned:
                continue  # it was called while another was deleted
            try:
                await self._remove(run, None, delete_checkpoints=False)
            except (MintError, OSError):
                logger.exception("run=%s could not be deleted; it will be tried again", run.id)
            else:
                self._expiries.add(run.origin.tenant, run.id, run.retention.limit_s)

    async def drain(self, limit_s: float) -> None:
        """Accepts nothing more, lets what is under way end, and has rows written, as far as there
        is time: what is left is in the journal.
        """
        self._draining = Unavailable("the server is shutting down; send the call again")
        started_s = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(FINISHING_SHARE * limit_s):
                await self._execution.finish()
        self._scheduler.hold()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s - (time.monotonic() - started_s)):
                idle = [run for run in self._runs.values() if not run.turns.busy]
                await self._durability.snapshots.cover_all(idle)
                await self._ledger.flush()
        self._abandon(self._draining)

    async def stop(self) -> None:
        await self._execution.stop()

    def _refusal(self) -> MintError | None:
        """Why no call is accepted now, if so."""
        return self._draining or self._durability.refusal()

    def _check_journal(self) -> None:
        """Raises if nothing can be promised any more, old or new."""
        if self._durability.journal.failed and (trouble := self._durability.journal.trouble()):
            raise trouble

    def _check_accepting(self) -> None:
        """Raises if no request that changes something is accepted now."""
        if error := self._draining or self._durability.journal.trouble():
            raise error

    def _check_resumed(self) -> None:
        """Raises if a run's accepted calls may not have their turns yet, before which nothing that
        waits for them must come.
        """
        if not self._resumed:
            raise Unavailable("the base model is still being loaded; send the call again")

    def _abandon(self, error: MintError) -> None:
        """Sends all callers away: nothing more will be answered."""
        for run in self._runs.values():
            run.sequence.abandon(error)

    def _note_pass(self, plan: Plan, results: Sequence[TileResult], elapsed_s: float) -> None:
        self._ledger.passed(plan.tiles)
        tokens = sum(map(tile_tokens, plan.tiles))
        for tile in plan.tiles:
            if run := self._runs.get(tile.training_run_id):
                run.exposure.seconds += elapsed_s * tile_tokens(tile) / tokens

    def _stir_watchers(self) -> None:
        for run in self._runs.values():
            run.stir_watchers()

    def _note_trouble(self, training_run_id: str, trouble: str) -> None:
        if run := self._runs.get(training_run_id):
            run.trouble = trouble
            run.stir_watchers()

    def _find(self, tenant: str, training_run_id: str) -> Run:
        """A run that is being called: its retention time starts again."""
        run = self._runs.get(training_run_id)
        if is_uploaded(training_run_id):
            raise TrainingRunUploaded(training_run_id)
        if run is None or run.origin.tenant != tenant:
            raise self._expiries.not_found(tenant, training_run_id)
        run.retention.touch()
        return run

    async def _create(self, tenant: str, request: CreateRun) -> RunView:
        self._check_accepting()
        if error := self._durability.refusal():
            raise error
        run, snapshot = await self._make(tenant, request)
        view = run.view()
        self._ledger.created(run, snapshot, request.identity, view)
        await self._ledger.flush()
        if snapshot is not None:
            self._durability.snapshots.replaced(run, snapshot)
        self._runs[run.id] = run
        return view

    async def _make(self, tenant: str, request: CreateRun) -> tuple[Run, SnapshotRecord | None]:
        """Makes a run and its row; one that starts from a checkpoint is on disk apart from it."""
        training_run_id = f"run-{secrets.token_hex(8)}"
        job = await self._row_to_make(training_run_id, tenant, request)
        deaths = 0
        while deaths < MOST_ATTEMPTS:
            life = await self._scheduler.up()
            try:
                description: RowDescription = await self._scheduler.row(job, life)
                run = self._new_run(tenant, request, job, description)
                run.presence.life = life
                if job.start is None:
                    return run, None
                return run, await self._durability.snapshots.take(run, 0)
            except EngineDied as death:
                deaths += not isinstance(death, NotStarted)
                logger.warning("an engine ended while a run was made: %s", death.message)
        raise EngineFault(f"{MOST_ATTEMPTS} engines ended while they made the run")

    def _new_run(
        self, tenant: str, request: CreateRun, job: CreateRow, description: RowDescription
    ) -> Run:
        model = self._scheduler.model
        origin = RunOrigin(
            training_run_id=job.training_run_id,
            tenant=tenant,
            number=next(self._numbers),
            base_model=model.name,
            base_fingerprint=model.fingerprint,
            spec=description.spec,
            trainable_parameter_count=description.trainable_parameter_count,
            row_bytes=description.row_bytes,
            create_time=datetime.now(UTC),
            isolated=request.isolated,
            tile_tokens=most_tile_tokens(self._scheduler.max_batch_tokens),
        )
        state = RunState(
            step=job.start.step if job.start else 0, update_time_s=origin.create_time.timestamp()
        )
        retention = Retention(request.retention_s or self._retention_s, self._clock)
        return self._run(origin, state, request.metadata, retention)

    def _run(
        self,
        origin: RunOrigin,
        state: RunState,
        metadata: Mapping[str, str],
        retention: Retention,
    ) -> Run:
        return Run(
            origin,
            state,
            metadata=metadata,
            hooks=self._hooks,
            limits=self._limits,
            retention=retention,
        )

    async def _row_to_make(
        self, training_run_id: str, tenant: str, request: CreateRun
    ) -> CreateRow:
        source = request.source
        if not isinstance(source, Load):
            return CreateRow(training_run_id=training_run_id, request=source)
        opened = await self._checkpoints.open(source, tenant)
        model = self._scheduler.model
        opened.check_base(model.name, model.fingerprint)
        opened.check_rank(model)
        start = await opened.arrays()
        return CreateRow(training_run_id=training_run_id, request=opened.spec, start=start)

    async def _open(self, tenant: str, request: OpenRun) -> RunView:
        self._check_accepting()
        self._check_resumed()
        run = self._find(tenant, request.training_run_id)
        run.check_usable()
        writer_epoch = run.sequence.open()
        self._ledger.fenced(run)
        async with run.turns.take(exclusive=True):
            run.check_usable()
            # Another may have opened it since.
            view = replace(run.view(), writer_epoch=writer_epoch)
            self._ledger.opened(run, request.identity, view)
        await self._ledger.flush()
        return view

    async def _update(self, tenant: str, request: UpdateRun) -> RunView:
        self._check_accepting()
        run = self._find(tenant, request.training_run_id)
        run.check_usable()
        run.metadata = request.metadata
        run.stir_watchers()
        view = run.view()
        self._ledger.updated(run, request.identity, view)
        await self._ledger.flush()
        return view

    async def _delete(self, tenant: str, request: DeleteRun) -> None:
        self._check_accepting()
        self._check_resumed()
        run = self._find(tenant, request.training_run_id)
        await self._remove(run, request.identity, delete_checkpoints=request.delete_checkpoints)

    async def _remove(
        self, run: Run, identity: Identity | None, *, delete_checkpoints: bool
    ) -> None:
        """Deletes a run; one whose deletion a crash has cut short is there again, and unharmed."""
        run.delete()
        async with run.turns.take(exclusive=True):
            await self._checkpoints.delete_run(run.origin, named=delete_checkpoints)
            with suppress(EngineDied):  # and the row with it
                await self._scheduler.row(DropRow(run.id), run.presence.life)
            self._runs.pop(run.id, None)
            self._ledger.removed(run, identity)
        await self._ledger.flush()
        run.end_watches()  # behind the ends of its calls
        self._durability.snapshots.forget(run)

"""All runs: made, found, opened, listed, changed, deleted. Another tenant's is not found."""

import asyncio
import copy
import itertools
import logging
import math
import secrets
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from mint_core.errors import EngineFault, MintError, Unavailable
from mint_core.rpc.metrics import Metrics
from trainer_service.backlog import Backlogs
from trainer_service.calls import Call, Load, Outcome
from trainer_service.checkpoints import Checkpoints
from trainer_service.errors import TrainingRunUploaded
from trainer_service.execution import Execution
from trainer_service.jobs import CreateRow, DropRow, RowArrays, RowDescription
from trainer_service.once import Once
from trainer_service.requests import CreateRun, DeleteRun, OpenRun, UpdateRun
from trainer_service.retention import EXPIRY_INTERVAL_S, Clock, Expiries, Retention
from trainer_service.run import Run, RunOrigin, RunView
from trainer_service.scheduler import Scheduler
from trainer_service.sequencing import SequenceLimits
from trainer_service.uploaded_runs import is_uploaded
from trainer_service.watching import Watch

logger = logging.getLogger(__name__)


class Runs:
    """The runs of this trainer. In memory: they end with the process, and with its engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        checkpoints: Checkpoints,
        metrics: Metrics,
        limits: SequenceLimits,
        backlogs: Backlogs,
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
        self._execution = Execution(scheduler, checkpoints, metrics, backlogs)
        self._once = Once()
        self._runs: dict[str, Run] = {}  # oldest first
        self._numbers = itertools.count(1)
        scheduler.on_progress = self._stir_watchers
        checkpoints.handoff.on_trouble = self._note_trouble

    async def submit(self, tenant: str, call: Call) -> Outcome:
        """Brings a sequenced call to its run and returns its outcome, or raises it."""
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
        return await self._once.run(
            tenant, request.identity, lambda: self._open(tenant, request.training_run_id)
        )

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

    def lose(self, why: str) -> None:
        """Notes that the engine died, and every row with it."""
        for run in self._runs.values():
            run.lose(why)
        self._scheduler.lose(why)

    def end_watches(self) -> None:
        """Sends watchers away, who would hold up the end of the service."""
        for run in self._runs.values():
            run.end_watches(Unavailable("the server is shutting down; watch again"))

    async def keep_expiring(self) -> None:
        """Deletes abandoned runs, now and then, until cancelled."""
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL_S)
            await self.expire()

    async def expire(self) -> None:
        """Deletes the runs that nobody has called for their retention time. What has a name in
        the store stays.
        """
        for run in [run for run in self._runs.values() if run.abandoned]:
            if not run.abandoned:
                continue  # it was called while another was deleted
            try:
                await self._remove(run, delete_checkpoints=False)
            except (MintError, OSError):
                logger.exception("run=%s could not be deleted; it will be tried again", run.id)
            else:
                self._expiries.add(run.origin.tenant, run.id, run.retention.limit_s)

    async def stop(self) -> None:
        await self._execution.stop()

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
        training_run_id = f"run-{secrets.token_hex(8)}"
        job = await self._row_to_make(training_run_id, tenant, request)
        description = await self._scheduler.create_row(job)
        origin = self._origin(training_run_id, tenant, description, request.isolated)
        run = Run(
            origin,
            step=job.start.step if job.start else 0,
            metadata=request.metadata,
            accept=self._execution.accept,
            limits=self._limits,
            refusal=self._backlogs.refusal,
            retention=Retention(request.retention_s or self._retention_s, self._clock),
        )
        self._runs[run.id] = run
        return run.view()

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
        start: RowArrays = await opened.arrays()
        return CreateRow(training_run_id=training_run_id, request=opened.spec, start=start)

    def _origin(
        self, training_run_id: str, tenant: str, description: RowDescription, isolated: bool
    ) -> RunOrigin:
        model = self._scheduler.model
        return RunOrigin(
            training_run_id=training_run_id,
            tenant=tenant,
            number=next(self._numbers),
            base_model=model.name,
            base_fingerprint=model.fingerprint,
            spec=description.spec,
            trainable_parameter_count=description.trainable_parameter_count,
            row_bytes=description.row_bytes,
            create_time=datetime.now(UTC),
            isolated=isolated,
        )

    async def _open(self, tenant: str, training_run_id: str) -> RunView:
        run = self._find(tenant, training_run_id)
        run.check_usable()
        writer_epoch = run.sequence.open()
        async with run.turns.take(exclusive=True):
            run.check_usable()
            return replace(run.view(), writer_epoch=writer_epoch)  # another may have opened since

    async def _update(self, tenant: str, request: UpdateRun) -> RunView:
        run = self._find(tenant, request.training_run_id)
        run.check_usable()
        run.metadata = request.metadata
        run.stir_watchers()
        return run.view()

    async def _delete(self, tenant: str, request: DeleteRun) -> None:
        run = self._find(tenant, request.training_run_id)
        await self._remove(run, delete_checkpoints=request.delete_checkpoints)

    async def _remove(self, run: Run, *, delete_checkpoints: bool) -> None:
        run.delete()
        async with run.turns.take(exclusive=True):
            await self._checkpoints.delete_run(run.origin, named=delete_checkpoints)
            if not run.view().lost:
                with suppress(EngineFault):  # it died, and the row with it
                    await self._scheduler.row(DropRow(run.id))
            self._runs.pop(run.id, None)
            run.end_watches()

"""Making a run: its row in an engine, and what is said of it."""

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple

from mint_core.errors import EngineDied, EngineFault, Unavailable
from trainer_service.calls import Load
from trainer_service.groups.group import Group
from trainer_service.jobs import CreateRow, DropRow, RowDescription, SavedRow, Source
from trainer_service.queue.planner import most_tile_tokens
from trainer_service.queue.scheduler import NotStarted
from trainer_service.run.services import RunServices
from trainer_service.run_description import RunOrigin, RunState
from trainer_service.wire.requests import CreateRun

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 3  # at a row with which engines die


class Made(NamedTuple):
    """What is known of a run."""

    origin: RunOrigin
    state: RunState
    group: Group
    life: int  # of the engine that has its row
    saved_row: SavedRow | None  # of one that starts from a checkpoint, on disk apart from that


class Creation:
    """All methods belong to one event loop."""

    def __init__(self, services: RunServices) -> None:
        self._groups = services.groups
        self._checkpoints = services.checkpoints
        self._saved_rows = services.saved_rows

    async def make(self, tenant: str, request: CreateRun, number: Callable[[], int]) -> Made:
        """Makes a row, and gives it a number once it is there."""
        job = await self._row_to_make(f"run-{secrets.token_hex(8)}", tenant, request)
        try:
            group, life, description, saved_row = await self._make_row(job)
        except BaseException:
            self._groups.forget(job.training_run_id)
            raise
        origin = self._origin(tenant, request, job, description, number(), group)
        created_s = origin.create_time.timestamp()
        step = job.request.step if isinstance(job.request, Source) else 0
        state = RunState(step=step, update_time_s=created_s)
        return Made(origin, state, group, life, saved_row)

    async def _make_row(self, job: CreateRow) -> tuple[Group, int, RowDescription, SavedRow | None]:
        """Where it is, and what is said of it."""
        deaths = 0
        while deaths < MOST_ATTEMPTS:
            group = self._groups.expect(job.training_run_id)
            try:
                life = await self._groups.up(group)
            except Unavailable:  # another is up, or comes
                if self._groups.closed:
                    raise
                continue
            try:
                description = await group.scheduler.row(job, life)
                saved_row = None
                if isinstance(job.request, Source):
                    saved_row = await self._saved_rows.take(group, job.training_run_id, 0, life)
            except EngineDied as death:
                deaths += not isinstance(death, NotStarted)
                logger.warning("an engine ended while a run was made: %s", death.message)
            except BaseException:
                with suppress(EngineDied):
                    await group.scheduler.row(DropRow(job.training_run_id), life)
                raise
            else:
                return group, life, description, saved_row
        raise EngineFault(f"{MOST_ATTEMPTS} engines ended while they made the run")

    def _origin(
        self,
        tenant: str,
        request: CreateRun,
        job: CreateRow,
        description: RowDescription,
        number: int,
        group: Group,
    ) -> RunOrigin:
        model = self._groups.model
        return RunOrigin(
            training_run_id=job.training_run_id,
            tenant=tenant,
            number=number,
            base_model=model.name,
            base_fingerprint=model.fingerprint,
            spec=description.spec,
            trainable_parameter_count=description.trainable_parameter_count,
            row_bytes=description.row_bytes,
            create_time=datetime.now(UTC),
            isolated=request.isolated,
            tile_tokens=most_tile_tokens(group.scheduler.max_batch_tokens),
        )

    async def _row_to_make(
        self, training_run_id: str, tenant: str, request: CreateRun
    ) -> CreateRow:
        source = request.source
        if not isinstance(source, Load):
            return CreateRow(training_run_id, source)
        opened = await self._checkpoints.open(source, tenant)
        opened.check_served(self._groups.model)
        return CreateRow(training_run_id, opened.source)

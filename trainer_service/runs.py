"""All runs: made, found, opened, listed, changed, deleted. Another tenant's is not found."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from mint_core.errors import EngineDied, MintError, ModelLoading, TrainingRunNotFound, Unavailable
from mint_core.fault_points import fault_point
from mint_core.rpc.errors import Recorded
from mint_core.rpc.metrics import Metrics
from mint_core.rpc.quotas import Account
from trainer_service import remembered
from trainer_service.calls import Call
from trainer_service.creation import Creation
from trainer_service.errors import TrainingRunUploaded
from trainer_service.jobs import DropRow
from trainer_service.journal.changes import decode_reply, forget_requests
from trainer_service.journal.codec import encode_origin
from trainer_service.journal.ledger import PastRun, load_runs, next_number
from trainer_service.journal.queries import load_requests
from trainer_service.journal.records import RunRecord
from trainer_service.journal.run_journal import RunJournal
from trainer_service.journal.writer import Journal, Written
from trainer_service.queue.admission import Admission
from trainer_service.run.call_numbers import CallLimits
from trainer_service.run.loop import RunLoop
from trainer_service.run.retention import EXPIRY_INTERVAL_S, Clock, Expiries, Retention
from trainer_service.run.run import Run
from trainer_service.run.services import RunServices
from trainer_service.run.watching import Event, RunEvents
from trainer_service.run_description import RunOrigin, RunState, RunView
from trainer_service.run_table import RunTable
from trainer_service.uploaded_runs import is_uploaded
from trainer_service.wire.idempotency import REMEMBERED_S, Once
from trainer_service.wire.requests import CreateRun, DeleteRun, Identity, OpenRun, UpdateRun
from trainer_service.wire.responses import create_response, open_response, update_response

logger = logging.getLogger(__name__)

FINISHING_SHARE = 0.6  # of the time of a drain, for calls under way; the rest is for saving rows


@dataclass(frozen=True, slots=True)
class _Removal:
    """Of a run that is gone for its callers."""

    named: bool  # whether its named checkpoints go too
    begun: Written | None = None  # done when that is on disk; None: it was before the start
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Runs:
    """The runs of this trainer. They outlive the process, and its engine: the journal has them.

    What changes a run and acts once answers with the bytes that are remembered.
    """

    def __init__(
        self,
        services: RunServices,
        journal: Journal,
        admission: Admission,
        limits: CallLimits,
        table: RunTable,
        ids: Account,
        metrics: Metrics,
        retention_s: float = math.inf,
        clock: Clock = time.monotonic,
    ) -> None:
        self._services = services
        self._groups = services.groups
        self._journal = journal
        self._admission = admission
        self._limits = limits
        self._retention_s = retention_s
        self._clock = clock
        self._expiries = Expiries(metrics)
        self._creation = Creation(services)
        self._once = Once(ids)
        self._table = table
        self._loops: dict[Run, RunLoop] = {}
        self._closing: dict[Run, _Removal] = {}
        self._recalled = False  # whether accepted calls of before a restart have their places
        self._past = list(self._recall())
        self._numbers = itertools.count(next_number(journal))

    def _recall(self) -> Iterable[tuple[Run, PastRun]]:
        """Takes in what the journal knows."""
        files = {}
        for past in load_runs(self._journal):
            state = past.record.state
            retention = Retention(past.record.retention_s, self._clock)
            retention.resume(time.time() - state.update_time_s)
            run = self._run_of(past.origin, state, past.record.metadata, retention)
            self._table.add(run)
            run.closing = past.record.removing is not None
            numbers = [
                (call.sequence, call.payload_hash, decode_reply(call.answer, call.sequence))
                for call in past.calls
            ]
            run.numbers.resume(state, numbers)
            ended = [call.sequence for call in past.calls if call.answer is not None]
            run.ended = max(ended, default=state.dropped)
            run.unsaved.calls = int(past.dirty)
            if past.saved_row is not None:
                files[run.id] = past.saved_row.file
            yield run, past
        for request in load_requests(self._journal.database):
            identity = Identity(request.request_id, request.payload_hash)
            self._once.recall(request.tenant, identity, request.time_s, request.answer)
        self._services.saved_rows.keep(files)

    def start(self) -> None:
        """Goes on with the calls that were accepted before a restart, once there is a model."""
        past, self._past = self._past, []
        for run, before in past:
            if run.closing:
                self._closing[run] = _Removal(named=bool(before.record.removing))
                self._services.tasks.start(self._remove_later(run), f"removal of {run.id}")
                continue
            self._loops[run] = RunLoop(run, self._services)
            for call in before.unanswered(self._groups.model):
                run.begin(call)
        self._recalled = True
        self._services.tasks.start(self._keep_expiring(), "expiry of runs")
        self._services.tasks.start(self._await_failure(), "watch over the journal")

    async def submit(self, tenant: str, call: Call) -> bytes:
        """Brings a sequenced call to its run and returns its answer, or raises it."""
        self._admission.check_answers()
        run = self.find(tenant, call.place.training_run_id)
        arrival = run.arrive(call)
        try:
            reply = await arrival.reply
            run.numbers.told(arrival)
        finally:
            run.numbers.leave(arrival)
        if reply.failed:
            raise Recorded(reply.content)
        return reply.content

    async def create(self, tenant: str, request: CreateRun) -> bytes:
        kept = await self._once.run(tenant, request.identity, lambda: self._create(tenant, request))
        return self._whole(tenant, kept, request.metadata)

    async def open(self, tenant: str, request: OpenRun) -> bytes:
        """Fences earlier writers, and waits for the calls they were promised."""
        kept = await self._once.run(tenant, request.identity, lambda: self._open(tenant, request))
        return self._whole(tenant, kept, None)

    async def update(self, tenant: str, request: UpdateRun) -> bytes:
        kept = await self._once.run(tenant, request.identity, lambda: self._update(tenant, request))
        return self._whole(tenant, kept, request.metadata)

    def _whole(self, tenant: str, kept: bytes, metadata: Mapping[str, str] | None) -> bytes:
        """An answer as it is sent, about a run that is still there; without metadata, with those
        that the run has now.
        """
        if not (run_id := remembered.run_of(kept)):
            return kept
        run = self._table.get(run_id)
        if run is None:
            raise self._expiries.not_found(tenant, run_id)
        return remembered.whole(kept, run.origin, run.metadata if metadata is None else metadata)

    async def delete(self, tenant: str, request: DeleteRun) -> bytes:
        delete = partial(self._delete, tenant, request)
        return await self._once.run(tenant, request.identity, delete, frees=True)

    def get(self, tenant: str, training_run_id: str) -> RunView:
        return self.view(self.find(tenant, training_run_id))

    def watch(
        self, tenant: str, training_run_id: str, resume_after: int = 0
    ) -> AsyncGenerator[Event, None]:
        run = self.find(tenant, training_run_id)
        events = run.watched
        if not isinstance(events, RunEvents):
            events = RunEvents(
                run,
                partial(self.view, run),
                lambda: run.group.scheduler.forecast(tenant, training_run_id),
                [self._groups.followers, self._services.checkpoints.handoff.followers],
            )
        return events.read(resume_after)

    def end_watches(self) -> None:
        """Sends watchers away, who would hold up the end of the service."""
        for run in self._table.all():
            run.end_watches(Unavailable("the server is shutting down; watch again"))

    async def expire(self) -> None:
        """Deletes the runs that nobody has called for their retention time. What has a name in
        the store stays. Deletions that have failed are tried again.
        """
        for run in list(self._table.all()):
            if run in self._closing:
                await self._remove_later(run)
            elif run.abandoned:
                await self._close(run, None, named=False)
                await self._remove_later(run)
                self._expiries.add(run.origin.tenant, run.id, run.retention.limit_s)

    async def drain(self, limit_s: float) -> None:
        """Accepts nothing more, lets what is under way end, and has rows saved, as far as there is
        time: what is left is in the journal.
        """
        self._admission.draining = Unavailable("the server is shutting down; send the call again")
        started_s = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(FINISHING_SHARE * limit_s):
                for run in list(self._loops):
                    await run.inbox.at_rest.wait()
        self._groups.hold()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s - (time.monotonic() - started_s)):
                idle = [run for run in self._loops if run.inbox.at_rest.is_set()]
                await self._services.saved_rows.cover(idle)
                await self._journal.flush()
        self._abandon(self._admission.draining)
        self.end_watches()

    async def _keep_expiring(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL_S)
            await self.expire()
            forget = partial(forget_requests, before_s=time.time() - REMEMBERED_S)
            self._journal.write(forget, soon=False)

    async def _await_failure(self) -> None:
        """Sends all callers away when the journal has failed."""
        self._abandon(await self._journal.failed())

    def _abandon(self, error: MintError) -> None:
        """Sends all callers away: nothing more will be answered."""
        for run in self._table.all():
            run.numbers.abandon(error)

    def view(self, run: Run) -> RunView:
        trouble = self._services.checkpoints.handoff.troubles.get(run.id, "")
        return replace(run.view(), trouble=trouble)

    def find(self, tenant: str, training_run_id: str) -> Run:
        """A run that is being called: its retention time starts again."""
        run = self._table.get(training_run_id)
        if is_uploaded(training_run_id):
            raise TrainingRunUploaded(training_run_id)
        if run is None or run.origin.tenant != tenant or run.closing:
            raise self._expiries.not_found(tenant, training_run_id)
        run.retention.touch()
        return run

    def _find_changing(self, tenant: str, training_run_id: str) -> Run:
        """A run that is to be opened or deleted, which waits for its accepted calls."""
        self._admission.check_changes()
        if not self._recalled:
            raise ModelLoading
        return self.find(tenant, training_run_id)

    async def _create(self, tenant: str, request: CreateRun) -> bytes:
        if error := self._admission.refusal():
            raise error
        number = partial(next, self._numbers)
        with self._table.room(tenant):
            made = await self._creation.make(tenant, request, number)
        retention = Retention(request.retention_s or self._retention_s, self._clock)
        run = self._run_of(made.origin, made.state, request.metadata, retention)
        self._groups.assign(run, made.group)
        run.row_life = made.life
        answer = remembered.brief(create_response(run.view()))
        record = RunRecord(
            number=run.origin.number,
            training_run_id=run.id,
            origin=encode_origin(run.origin),
            metadata=run.metadata,
            retention_s=run.retention.limit_s,
            removing=None,
            state=run.state,
        )
        try:
            await run.journal.created(record, made.saved_row, request.identity, answer)
        except MintError:  # what is not noted is not there
            self._groups.forget(run.id)
            with suppress(EngineDied):
                await run.group.scheduler.row(DropRow(run.id), run.row_life)
            raise
        if made.saved_row is not None:
            self._services.saved_rows.replaced(run, made.saved_row)
        self._table.add(run)
        self._loops[run] = RunLoop(run, self._services)
        return answer

    def _run_of(
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
            retention=retention,
            journal=RunJournal(self._journal, origin),
            admission=self._admission,
            limits=self._limits,
            group=self._groups.first,
        )

    async def _open(self, tenant: str, request: OpenRun) -> bytes:
        run = self._find_changing(tenant, request.training_run_id)
        run.check_usable()
        writer_epoch = run.open()

        async def answer() -> bytes:
            run.check_usable()
            # Another may have opened it since.
            return remembered.brief(open_response(self.view(run), writer_epoch))

        answered: bytes = await run.inbox.behind(run.numbers.next_sequence, answer)
        await run.journal.answered(run.state, request.identity, answered)
        return answered

    async def _update(self, tenant: str, request: UpdateRun) -> bytes:
        self._admission.check_changes()
        run = self.find(tenant, request.training_run_id)
        run.check_usable()
        run.metadata = request.metadata
        run.stir_watchers()
        answer = remembered.brief(update_response(self.view(run)))
        await run.journal.updated(run.metadata, request.identity, answer)
        return answer

    async def _delete(self, tenant: str, request: DeleteRun) -> bytes:
        run = self._table.get(request.training_run_id)
        if run is None or run.origin.tenant != tenant or run not in self._closing:
            run = self._find_changing(tenant, request.training_run_id)
            await self._close(run, request.identity, named=request.delete_checkpoints)
        await self._remove(run)
        return b""

    async def _close(self, run: Run, identity: Identity | None, *, named: bool) -> None:
        """Has a run gone for its callers as soon as that is on disk. From then on it is removed,
        whatever happens, if need be after a restart.
        """
        run.closing = True
        begun = run.journal.removal_begun(identity, named=named)
        self._closing[run] = _Removal(named, begun)
        await begun
        fault_point("removal:begun")
        gone = TrainingRunNotFound(run.id)
        run.abandon(gone)
        run.group.scheduler.withdraw(run.id, gone)

    async def _remove(self, run: Run) -> None:
        """Removes what a run that is closing has left, and its record last."""
        removal = self._closing[run]
        if removal.begun is not None:
            await removal.begun
        async with removal.lock:
            if run not in self._closing:
                return  # somebody else has
            if loop := self._loops.get(run):
                await loop.end()
            await self._services.checkpoints.handoff.delete_run(run.origin, named=removal.named)
            if run.row_life:
                with suppress(EngineDied):  # and the row with it
                    await run.group.scheduler.row(DropRow(run.id), run.row_life)
            self._groups.forget(run.id)
            self._services.saved_rows.forget(run)
            fault_point("removal:before-record")
            await run.journal.removed()
            self._table.remove(run)
            del self._closing[run]
            self._loops.pop(run, None)
        run.end_watches()  # behind the ends of its calls

    async def _remove_later(self, run: Run) -> None:
        try:
            await self._remove(run)
        except (MintError, OSError):
            logger.exception("run=%s could not be deleted; it will be tried again", run.id)

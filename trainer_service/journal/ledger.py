"""What the front tells its journal, and asks of it: runs and calls in, records out."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import FailedPrecondition, MintError
from mint_core.lora.spec import AdapterSpec
from trainer_service.errors import StateDamaged
from trainer_service.jobs import Tile
from trainer_service.journal import changes, codec, queries, records
from trainer_service.journal.records import (
    CallRecord,
    Effect,
    PastCall,
    RequestRecord,
    RunRecord,
    SnapshotRecord,
    TileRecord,
)
from trainer_service.journal.writer import Journal, Statement
from trainer_service.run.call_numbers import PastNumber
from trainer_service.run.calls import Call, Course, Method, Outcome, Place, Stepped, Work
from trainer_service.run.run import Run, RunOrigin, RunView
from trainer_service.wire.requests import Identity
from trainer_service.wire.sequenced_requests import LARGE_BYTES


@dataclass(frozen=True, slots=True)
class Past:
    """What it takes to have a run's row again."""

    snapshot: SnapshotRecord | None  # None: it starts as it was created
    calls: Sequence[PastCall]  # behind it


@dataclass(frozen=True, slots=True)
class PastRun:
    """A run as it was before a restart."""

    record: RunRecord
    origin: RunOrigin
    calls: Sequence[CallRecord]  # that are not acknowledged
    file: str | None  # of its snapshot

    def bring_back(self, run: Run) -> None:
        """Gives a run its numbers and answers."""
        state = self.record.state
        past = [
            PastNumber(
                call.sequence,
                call.payload_hash,
                None
                if call.answer is None
                else codec.decode_outcome(_method(call.method), call.answer),
            )
            for call in self.calls
        ]
        run.sequence.resume(state.acknowledged, state.writer_epoch, past)
        ended = [call.sequence for call in self.calls if call.answer is not None]
        run.ended = max(ended, default=state.acknowledged)
        run.exposure.calls = int(self.record.dirty)

    def unanswered(self, run: Run, model: ModelDescription) -> Iterator[Call]:
        """The calls that were accepted and have not ended, in order."""
        for record in self.calls:
            if record.payload is None:
                continue
            method = _method(record.method)
            place = Place(
                training_run_id=run.id,
                sequence=record.sequence,
                writer_epoch=run.sequence.writer_epoch,
                acknowledged_sequence=run.sequence.acknowledged,
                payload_hash=record.payload_hash,
            )
            work = codec.decode_request(method, record.payload, model)
            course = Course(deaths=record.deaths)
            yield Call(place, method, work, codec.payload(record.payload), course)


Pasts = tuple[dict[str, Past], dict[int, list[TileRecord]]]


class Ledger:
    """All of it is for one event loop; nothing but the reads waits."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._plans = queries.next_plan(journal.database)
        self._numbers: dict[str, int] = {}  # by run
        # Where a row's numbers may depend on who shares a pass, those who shared it are kept too.
        self.shared_plans = False

    def refusal(self) -> MintError | None:
        """Why nothing may be accepted now, if so."""
        return self._journal.trouble()

    async def flush(self) -> None:
        """Waits until all that was noted is on disk."""
        await self._journal.flush()

    def check_base(self, model: ModelDescription) -> None:
        """Refuses a journal of another base model; a new one is this one's from now on."""
        database = self._journal.database
        found = queries.load_server(database)
        if "base_fingerprint" not in found:
            values = {"base_model": model.name, "base_fingerprint": model.fingerprint}
            changes.note_server(database, values)
        elif found["base_fingerprint"] != model.fingerprint:
            raise FailedPrecondition(
                f"`state` holds runs of base model {found['base_model']} with fingerprint "
                f"{found['base_fingerprint']}, and this is {model.name} with {model.fingerprint}; "
                "serve that model, or choose another folder"
            )

    def next_number(self) -> int:
        """For a new run."""
        return queries.next_number(self._journal.database)

    def load_runs(self) -> Iterator[PastRun]:
        """All runs, oldest first; before the journal starts."""
        database = self._journal.database
        for record in queries.load_runs(database):
            snapshot = queries.load_snapshot(database, record.number)
            calls = queries.load_calls(database, record.number, record.state.acknowledged)
            origin = codec.decode_origin(record.origin)
            yield PastRun(record, origin, list(calls), snapshot.file if snapshot else None)

    def load_requests(self) -> Iterator[tuple[str, Identity, float, RunView | None]]:
        """The requests that are remembered and their answers, oldest first."""
        for found in queries.load_requests(self._journal.database):
            identity = Identity(found.request_id, found.payload_hash)
            yield found.tenant, identity, found.time_s, codec.decode_view(found.answer)

    def know(self, run: Run) -> None:
        """Takes note of a run's number."""
        self._numbers[run.id] = run.origin.number

    def created(
        self, run: Run, snapshot: SnapshotRecord | None, identity: Identity, view: RunView
    ) -> None:
        self.know(run)
        record = RunRecord(
            number=run.origin.number,
            origin=codec.encode_origin(run.origin),
            metadata=run.metadata,
            retention_s=run.retention.limit_s,
            state=run.state(),
            covered=0,
            dirty=False,
        )
        statements: list[Statement] = [lambda db: changes.add_run(db, record, run.id)]
        if snapshot is not None:
            statements.append(self._cover(run, snapshot))
        self._journal.write(*statements, self._remember(run, identity, view))

    def opened(self, run: Run, identity: Identity, view: RunView) -> None:
        self._journal.write(self._state(run), self._remember(run, identity, view))

    def fenced(self, run: Run) -> None:
        """Notes a new writer epoch."""
        self._journal.write(self._state(run))

    def updated(self, run: Run, identity: Identity, view: RunView) -> None:
        number, metadata = run.origin.number, run.metadata
        self._journal.write(
            lambda db: changes.set_metadata(db, number, metadata),
            self._state(run),
            self._remember(run, identity, view),
        )

    def removed(self, run: Run, identity: Identity | None) -> None:
        """Notes that a run is deleted; with an identity, since a caller asked for it."""
        number, shared = run.origin.number, self.shared_plans
        self._numbers.pop(run.id, None)
        statements: list[Statement] = [
            lambda db: changes.remove_run(db, number, shared_plans=shared)
        ]
        if identity is not None:
            statements.append(self._remember(run, identity, None))
        self._journal.write(*statements)

    def accepted(self, run: Run, call: Call) -> None:
        place, method = call.place, call.method
        key = records.key(run.origin.number, place.sequence)
        self._journal.write(
            lambda db: changes.accept(
                db, key, method, place.payload_hash, codec.encode_request(call)
            )
        )

    def ended(
        self,
        run: Run,
        call: Call,
        outcome: Outcome,
        *,
        snapshot: SnapshotRecord | None = None,
        then: Callable[[], None],
    ) -> None:
        """Notes an outcome, with the snapshot that is its effect; `then` it may be told."""
        key = records.key(run.origin.number, call.place.sequence)
        method, effect = call.method, effect_of(call, outcome)
        digest = outcome.weight_digest if isinstance(outcome, Stepped) else None
        # Encoded on the journal's thread: answers may be large.
        end: Statement = lambda db: changes.end(  # noqa: E731
            db, key, effect, digest, codec.encode_outcome(method, outcome)
        )
        cover = [self._cover(run, snapshot)] if snapshot else []
        self._journal.write(end, *cover, self._state(run), then=then)

    def died(self, run: Run, call: Call) -> None:
        """Notes that an engine died with a call."""
        key = records.key(run.origin.number, call.place.sequence)
        self._journal.write(lambda db: changes.die(db, key))

    def acknowledged(self, run: Run, before: int, upto: int) -> None:
        number = run.origin.number
        self._journal.write(lambda db: changes.acknowledge(db, number, before, upto))

    def passed(self, tiles: Sequence[Tile]) -> None:
        """Notes a pass of which something will be needed if rows are to be restored."""
        noted = [
            TileRecord(
                self._numbers[tile.training_run_id],
                tile.sequence,
                tile.index,
                tile.first,
                len(tile.documents),
            )
            for tile in tiles
            if tile.training_run_id in self._numbers and (tile.backward or self.shared_plans)
        ]
        if not any(tile.backward for tile in tiles):
            return
        plan, self._plans = self._plans, self._plans + 1
        self._journal.write(lambda db: changes.add_plan(db, plan, noted))

    def covered(self, run: Run, snapshot: SnapshotRecord, then: Callable[[], None]) -> None:
        """Notes a snapshot, which replaces the one before it; `then` that is of no use."""
        if run.id in self._numbers:
            self._journal.write(self._cover(run, snapshot), then=then)

    def replayed_inexactly(self, run: Run) -> None:
        self._journal.write(self._state(run))

    def forget_requests(self, older_than_s: float) -> None:
        before_s = time.time() - older_than_s
        self._journal.write(lambda db: changes.forget_requests(db, before_s))

    async def pasts(self, runs: Sequence[Run]) -> Pasts:
        """What it takes to restore rows, by run, and the plans of which they have tiles."""
        numbers = {run.id: run.origin.number for run in runs}

        def read(db: sqlite3.Connection) -> Pasts:
            pasts = {}
            adding = []
            for name, number in numbers.items():
                snapshot = queries.load_snapshot(db, number)
                calls = queries.load_past(db, number, snapshot.sequence if snapshot else 0)
                pasts[name] = Past(snapshot, calls)
                adding += [
                    records.key(number, call.sequence)
                    for call in calls
                    if call.effect is Effect.ADD
                ]
            return pasts, queries.load_plans(db, adding)

        return await self._journal.read(read)

    async def spec(self, run: int) -> AdapterSpec:
        """The adapter of a run, given by number, that may be deleted."""
        origin = await self._journal.read(lambda db: queries.load_origin(db, run))
        return codec.decode_origin(origin).spec

    async def work(self, run: int, sequence: int, model: ModelDescription) -> Work:
        """What a past call of a run, given by number, asked for. Raises StateDamaged."""
        found = await self._journal.read(lambda db: queries.find_payload(db, run, sequence))
        if found is None:
            raise StateDamaged(f"number {run}", f"the journal lacks what call {sequence} asked for")
        decode = partial(codec.decode_request, _method(found.method), found.payload, model)
        if len(found.payload) < LARGE_BYTES:
            return decode()
        return await asyncio.to_thread(decode)  # it would hold up other calls

    def _state(self, run: Run) -> Statement:
        number, state = run.origin.number, run.state()
        return lambda db: changes.set_state(db, number, state)

    def _cover(self, run: Run, snapshot: SnapshotRecord) -> Statement:
        number, shared = run.origin.number, self.shared_plans
        return lambda db: changes.cover(db, number, snapshot, shared_plans=shared)

    def _remember(self, run: Run, identity: Identity, view: RunView | None) -> Statement:
        request = RequestRecord(
            tenant=run.origin.tenant,
            request_id=identity.request_id,
            payload_hash=identity.payload_hash,
            answer=codec.encode_view(view),
            time_s=time.time(),
        )
        return lambda db: changes.add_request(db, request)


def effect_of(call: Call, outcome: Outcome) -> Effect:
    """What a call has done to its run's row. Loads are told by the snapshots taken behind them."""
    failed = isinstance(outcome, MintError)
    match call.method:
        case "ForwardBackward" if not failed:
            return Effect.ADD
        case "OptimStep":
            return Effect.CLEAR if failed else Effect.STEP
        case "DiscardGradient" if not failed:
            return Effect.CLEAR
    return Effect.NONE


def _method(name: str) -> Method:
    return name  # type: ignore[return-value]  # as it was written

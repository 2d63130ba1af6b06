"""What one run tells the journal, and asks of it."""

import asyncio
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mint_core.engine_host.pipe import ModelDescription
from mint_core.rpc.limits import LARGE_BYTES
from mint_core.turns import Workers
from trainer_service.calls import Call, Outcome, Reply, Work
from trainer_service.errors import StateDamaged
from trainer_service.jobs import SavedRow
from trainer_service.journal import changes, codec, queries, records
from trainer_service.journal.writer import Journal, Statement, Written
from trainer_service.run_description import RunOrigin, RunState
from trainer_service.wire.requests import Identity


@dataclass(frozen=True, slots=True)
class Past:
    """What it takes to have a run's row again."""

    saved_row: SavedRow | None  # None: it starts as it was created
    calls: Sequence[records.PastCall]  # behind it


class RunJournal:
    """All of it is for one event loop. What is `Written` says when it is on disk, and raises
    RecordRefused if it cannot be; until then nobody may be told.
    """

    def __init__(self, journal: Journal, origin: RunOrigin) -> None:
        self._journal = journal
        self._origin = origin
        self._run = origin.number
        self._removed = False

    def created(
        self,
        record: records.RunRecord,
        saved_row: SavedRow | None,
        identity: Identity,
        answer: bytes,
    ) -> Written:
        statements: list[Statement] = [lambda db: changes.add_run(db, record)]
        if saved_row is not None:
            statements.append(self._cover(saved_row))
        return self._write(*statements, self._remember(identity, answer))

    def changed(self, state: RunState) -> Written:
        """Notes what has become of the run: fenced writers, an inexact replay."""
        return self._write(self._state(state), soon=False)

    def answered(self, state: RunState, identity: Identity, answer: bytes) -> Written:
        """Notes the answer of a request that acts once, and what it has changed."""
        return self._write(self._state(state), self._remember(identity, answer))

    def updated(self, metadata: Mapping[str, str], identity: Identity, answer: bytes) -> Written:
        set_metadata = partial(changes.set_metadata, run=self._run, metadata=metadata)
        return self._write(set_metadata, self._remember(identity, answer))

    def accepted(self, call: Call) -> Written:
        """Notes a call. One with a mark will change the store, and goes to disk at once."""
        place = call.place
        key = records.call_id(self._run, place.sequence)
        return self._write(
            lambda db: changes.accept(
                db, key, call.method, place.payload_hash, call.mark, codec.encode_payload(call)
            ),
            soon=bool(call.mark),
        )

    def ended(self, call: Call, outcome: Outcome, state: RunState) -> "asyncio.Future[Reply]":
        """Notes an outcome, with the saved row that is its effect. What is written is its reply."""
        key = records.call_id(self._run, call.place.sequence)
        end: Statement = lambda db: changes.end(  # noqa: E731
            db, key, outcome.effect, outcome.digest, outcome.reply
        )
        cover = [self._cover(outcome.saved_row)] if outcome.saved_row else []
        return self._write(self._state(state), *cover, end, lambda db: outcome.reply)

    def died(self, call: Call) -> Written:
        """Notes that an engine died with a call."""
        key = records.call_id(self._run, call.place.sequence)
        return self._write(lambda db: changes.die(db, key), soon=False)

    def dropped(self, before: int, upto: int, state: RunState) -> Written:
        """Drops the answers behind one number, up to another."""
        drop = partial(changes.drop, run=self._run, before=before, upto=upto)
        return self._write(self._state(state), drop, soon=False)

    def saved(self, row: SavedRow) -> Written:
        """Notes a saved row, which replaces the one before it."""
        return self._write(self._cover(row))

    def removal_begun(self, identity: Identity | None, *, named: bool) -> Written:
        """Notes that the run is gone; with an identity, since a caller asked for it."""
        statements: list[Statement] = [partial(changes.begin_removal, run=self._run, named=named)]
        if identity is not None:
            statements.append(self._remember(identity, b""))
        return self._write(*statements)

    def removed(self) -> Written:
        """Forgets the run. Nothing is written about it afterwards."""
        written = self._write(partial(changes.remove_run, run=self._run))
        self._removed = True
        return written

    async def past(self) -> Past:
        """What it takes to restore the row."""

        def read(db: sqlite3.Connection) -> Past:
            return Past(queries.load_saved_row(db, self._run), queries.load_past(db, self._run))

        return await self._journal.read(read)

    async def work(self, sequence: int, model: ModelDescription, decoders: Workers) -> Work:
        """What a past call asked for. Raises StateDamaged."""
        run = self._origin.training_run_id
        found = await self._journal.read(lambda db: queries.find_payload(db, self._run, sequence))
        if found is None:
            raise StateDamaged(run, f"the journal lacks what call {sequence} asked for")
        if len(found.payload) < LARGE_BYTES:
            return codec.decode_payload(found, run, sequence, model)
        tenant = self._origin.tenant  # others' calls must not wait for it
        return await decoders.run(tenant, codec.decode_payload, found, run, sequence, model)

    def _write(self, *statements: Statement, soon: bool = True) -> Written:
        assert not self._removed, f"{self._origin.training_run_id} is removed"
        return self._journal.write(*statements, soon=soon)

    def _state(self, state: RunState) -> Statement:
        return partial(changes.set_state, run=self._run, state=state)

    def _cover(self, row: SavedRow) -> Statement:
        return partial(changes.cover, run=self._run, row=row)

    def _remember(self, identity: Identity, answer: bytes) -> Statement:
        request = records.RequestRecord(
            tenant=self._origin.tenant,
            request_id=identity.request_id,
            payload_hash=identity.payload_hash,
            answer=answer,
            time_s=time.time(),
        )
        return partial(changes.add_request, request=request)

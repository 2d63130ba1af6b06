"""Whether a state folder holds all that its runs need, bit for bit."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from checkpoint_store.row_file import RowDamaged, RowFile
from mint_core.errors import MintError
from mintrpc.v1 import trainer_pb2
from trainer_service.journal import codec, queries, records
from trainer_service.journal.records import Effect, PastCall, TileRecord
from trainer_service.recovery.replay_order import Pass, replay_order
from trainer_service.run.calls import Method
from trainer_service.wire.requests import payload_hash


def problems(database: sqlite3.Connection, snapshots: Path) -> Iterator[str]:
    """Each of them in a sentence."""
    for (found,) in database.execute("PRAGMA integrity_check"):
        if found != "ok":
            yield f"the database is damaged: {found}"
    for record in list(queries.load_runs(database)):
        run = codec.decode_origin(record.origin).training_run_id
        for problem in _of_run(database, record, snapshots):
            yield f"{run}: {problem}"


def _of_run(
    database: sqlite3.Connection, record: records.RunRecord, snapshots: Path
) -> Iterator[str]:
    if snapshot := queries.load_snapshot(database, record.number):
        yield from _of_snapshot(snapshots / snapshot.file, snapshot.size_bytes)
    yield from _of_calls(database, record)
    past = queries.load_past(database, record.number, record.covered)
    adding = [records.key(record.number, c.sequence) for c in past if c.effect is Effect.ADD]
    plans = queries.load_plans(database, adding)
    wanted = [
        tile
        for item in replay_order({record.number: past}, plans)
        if isinstance(item, Pass)
        for tile in item.tiles
        if tile in item.wanted
    ]
    for call in past:
        yield from _of_past(database, record.number, call, wanted)


def _of_snapshot(path: Path, size_bytes: int) -> Iterator[str]:
    try:
        row = RowFile.open(path)
        if row.size_bytes != size_bytes:
            yield f"row file {path.name} is not the one that the journal tells of"
        for part in row.digests:
            row.read(part)
    except RowDamaged as error:
        yield error.message


def _of_calls(database: sqlite3.Connection, record: records.RunRecord) -> Iterator[str]:
    expected = record.state.acknowledged + 1
    for call in queries.load_calls(database, record.number, record.state.acknowledged):
        if call.sequence != expected:
            yield f"call {expected} is missing"
        expected = call.sequence + 1
        if call.answer is None and call.payload is None:
            yield f"call {call.sequence} has neither its request nor its answer"
        if call.answer is not None and not _readable(call.method, call.answer):
            yield f"the answer of call {call.sequence} cannot be read"


def _readable(method: str, answer: bytes) -> bool:
    try:
        codec.decode_outcome(method, answer)  # type: ignore[arg-type]  # as it was written
    except (DecodeError, ValueError, KeyError, MintError):
        return False
    return True


def _of_past(
    database: sqlite3.Connection, run: int, call: PastCall, tiles: list[TileRecord]
) -> Iterator[str]:
    """What is wrong with a call that would be done again."""
    if call.effect is Effect.CLEAR:
        return
    found = queries.find_payload(database, run, call.sequence)
    if found is None:
        yield f"the request of call {call.sequence} is missing"
        return
    request = _request(found)
    if request is None:
        yield f"the request of call {call.sequence} is not the one that was sent"
    elif call.effect is Effect.ADD:
        mine = [tile for tile in tiles if tile.sequence == call.sequence]
        ends = [0, *(tile.first + tile.documents for tile in mine)]
        if [tile.first for tile in mine] != ends[:-1] or ends[-1] != len(request.data):
            yield f"the passes of call {call.sequence} are not all known"


def _request(found: records.Payload) -> Any:
    """The request, if it is as it was when its hash was taken."""
    method: Method = found.method  # type: ignore[assignment]  # as it was written
    content = codec.payload(found.payload)
    try:
        request = getattr(trainer_pb2, f"{method}Request").FromString(content)
    except DecodeError:
        return None
    return request if payload_hash(request, content) == found.payload_hash else None

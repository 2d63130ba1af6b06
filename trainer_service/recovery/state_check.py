"""Whether a state folder holds all that its runs need, bit for bit."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2

from checkpoint_store.row_file import RowDamaged, RowFile
from mintrpc.v1 import trainer_pb2
from trainer_service.calls import Effect
from trainer_service.journal import codec, queries, records
from trainer_service.journal.records import PastCall
from trainer_service.wire.sequenced_requests import request_kind


def problems(database: sqlite3.Connection, saved_rows: Path) -> Iterator[str]:
    """Each of them in a sentence."""
    for (found,) in database.execute("PRAGMA integrity_check"):
        if found != "ok":
            yield f"the database is damaged: {found}"
    for record in list(queries.load_runs(database)):
        for problem in _of_run(database, record, saved_rows):
            yield f"{record.training_run_id}: {problem}"


def _of_run(
    database: sqlite3.Connection, record: records.RunRecord, saved_rows: Path
) -> Iterator[str]:
    row = queries.load_saved_row(database, record.number)
    if row is not None:
        yield from _of_saved_row(saved_rows / row.file, row.size_bytes)
    yield from _of_calls(database, record)
    for call in queries.load_past(database, record.number):
        yield from _of_past(database, record.number, call)


def _of_saved_row(path: Path, size_bytes: int) -> Iterator[str]:
    try:
        row = RowFile.open(path)
        if row.size_bytes != size_bytes:
            yield f"row file {path.name} is not the one that the journal tells of"
        for part in row.digests:
            row.read(part)
    except RowDamaged as error:
        yield error.message


def _of_calls(database: sqlite3.Connection, record: records.RunRecord) -> Iterator[str]:
    expected = record.state.dropped + 1
    for call in queries.load_calls(database, record.number, record.state.dropped):
        if call.sequence != expected:
            yield f"call {expected} is missing"
        expected = call.sequence + 1
        if call.answer is None and call.payload is None:
            yield f"call {call.sequence} has neither its request nor its answer"
        if call.answer is not None and not _readable(call.method, call.answer):
            yield f"the answer of call {call.sequence} cannot be read"


def _readable(method: str, answer: bytes) -> bool:
    kind = {b"S": status_pb2.Status, b"M": getattr(trainer_pb2, f"{method}Response")}
    return answer[:1] in kind and _parses(kind[answer[:1]], answer[1:])


def _of_past(database: sqlite3.Connection, run: int, call: PastCall) -> Iterator[str]:
    """What is wrong with a call that would be done again."""
    if call.effect is Effect.CLEAR:
        return
    found = queries.find_payload(database, run, call.sequence)
    if found is None:
        yield f"the request of call {call.sequence} is missing"
        return
    kind = request_kind(found.method)
    if not codec.is_as_sent(found) or not _parses(kind, codec.content_of(found.payload)):
        yield f"the request of call {call.sequence} is not the one that was sent"


def _parses(kind: type[Message], content: bytes) -> bool:
    try:
        kind.FromString(content)
    except DecodeError:
        return False
    return True

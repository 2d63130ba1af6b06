"""What is written to the journal, as SQL, on its thread: what is noted, and what is dropped because
no replay needs it any more.
"""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import astuple

from trainer_service.calls import Effect, Reply
from trainer_service.jobs import SavedRow
from trainer_service.journal import queries, records
from trainer_service.run_description import RunState
from trainer_service.wire import replies

_MESSAGE, _STATUS = b"M", b"S"  # before an answer: which of the two a reply is
_SET_STATE = (
    f"UPDATE states SET ({', '.join(records.STATE_COLUMNS)})"
    f" = ({', '.join('?' * len(records.STATE_COLUMNS))}) WHERE run = ?"
)


def add_run(db: sqlite3.Connection, record: records.RunRecord) -> None:
    metadata = json.dumps(dict(record.metadata))
    db.execute(
        "INSERT INTO runs (number, training_run_id, origin, metadata, retention_s)"
        " VALUES (?, ?, ?, ?, ?)",
        (record.number, record.training_run_id, record.origin, metadata, record.retention_s),
    )
    db.execute("INSERT INTO states VALUES (?, 0, 0, 0, 0, 0, 0, 0, 0, '', 0)", (record.number,))
    set_state(db, record.number, record.state)
    note_server(db, {"last_run": str(record.number)})


def set_metadata(db: sqlite3.Connection, run: int, metadata: Mapping[str, str]) -> None:
    content = json.dumps(dict(metadata))
    db.execute("UPDATE runs SET metadata = ? WHERE number = ?", (content, run))


def set_state(db: sqlite3.Connection, run: int, state: RunState) -> None:
    step, writer_epoch, acknowledged, gradient, *others = state
    db.execute(_SET_STATE, (step, writer_epoch, acknowledged, *gradient, *others, run))


def accept(
    db: sqlite3.Connection, call: int, method: str, payload_hash: bytes, mark: str, payload: bytes
) -> None:
    db.execute(
        "INSERT INTO calls (id, method, hash, mark) VALUES (?, ?, ?, ?)",
        (call, method, payload_hash, mark),
    )
    db.execute("INSERT INTO payloads VALUES (?, ?)", (call, payload))


def end(
    db: sqlite3.Connection, call: int, effect: Effect, digest: int | None, reply: Reply
) -> None:
    db.execute(
        "UPDATE calls SET effect = ?, digest = ? WHERE id = ?",
        (effect, records.signed(digest), call),
    )
    answer = (_STATUS if reply.failed else _MESSAGE) + reply.content
    db.execute("INSERT INTO answers VALUES (?, ?)", (call, answer))
    if effect not in (Effect.ADD, Effect.STEP):
        db.execute("DELETE FROM payloads WHERE id = ?", (call,))


def decode_reply(answer: bytes | None, sequence: int) -> Reply | None:
    if answer is None:
        return None
    return replies.told_again(Reply(answer[1:], answer[:1] == _STATUS), sequence)


def die(db: sqlite3.Connection, call: int) -> None:
    """Notes that an engine died with a call."""
    db.execute("UPDATE calls SET deaths = deaths + 1 WHERE id = ?", (call,))


def drop(db: sqlite3.Connection, run: int, before: int, upto: int) -> None:
    """Drops the answers behind `before` up to `upto`, and calls of which nothing is needed."""
    span = records.call_id(run, before + 1), records.call_id(run, upto)
    db.execute("DELETE FROM answers WHERE id BETWEEN ? AND ?", span)
    db.execute(
        "DELETE FROM calls WHERE id BETWEEN ? AND ? AND (effect = 0 OR id <= ?)",
        (*span, records.call_id(run, queries.covered(db, run))),
    )


def cover(db: sqlite3.Connection, run: int, row: SavedRow) -> None:
    """Puts a saved row in the place of the run's earlier one, and of the calls that are in it."""
    db.execute(
        "REPLACE INTO saved_rows VALUES (?, ?, ?, ?)", (run, row.sequence, row.file, row.size_bytes)
    )
    first = records.call_id(run, 0)
    db.execute(
        "DELETE FROM payloads WHERE id BETWEEN ? AND ?", (first, records.call_id(run, row.sequence))
    )
    (dropped,) = db.execute("SELECT dropped FROM states WHERE run = ?", (run,)).fetchone()
    done = records.call_id(run, min(row.sequence, dropped))
    db.execute("DELETE FROM calls WHERE id BETWEEN ? AND ?", (first, done))


def begin_removal(db: sqlite3.Connection, run: int, *, named: bool) -> None:
    """Notes that a run is gone for its callers; `named`: that its named checkpoints go too."""
    db.execute("UPDATE runs SET removing = ? WHERE number = ?", (named, run))


def remove_run(db: sqlite3.Connection, run: int) -> None:
    span = (records.call_id(run, 0), records.last_id(run))
    for table in ("answers", "payloads", "calls"):
        db.execute(f"DELETE FROM {table} WHERE id BETWEEN ? AND ?", span)
    for table in ("states", "saved_rows"):
        db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
    db.execute("DELETE FROM runs WHERE number = ?", (run,))


def add_request(db: sqlite3.Connection, request: records.RequestRecord) -> None:
    db.execute("REPLACE INTO requests VALUES (?, ?, ?, ?, ?)", astuple(request))


def forget_requests(db: sqlite3.Connection, before_s: float) -> None:
    db.execute("DELETE FROM requests WHERE time < ?", (before_s,))


def note_server(db: sqlite3.Connection, values: Mapping[str, str]) -> None:
    db.executemany("REPLACE INTO server VALUES (?, ?)", list(values.items()))

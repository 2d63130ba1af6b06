"""What is written to the journal, as SQL, on its thread: what is noted, and what is dropped because
no replay needs it any more.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence

from trainer_service.journal.queries import PLANS_BETWEEN
from trainer_service.journal.records import (
    SEQUENCE_BITS,
    Effect,
    RequestRecord,
    RunRecord,
    SnapshotRecord,
    TileRecord,
    key,
    last_key,
    place,
    signed,
)
from trainer_service.run.run import RunState

_ACKNOWLEDGED = "SELECT acknowledged FROM states WHERE run = ?"


def add_run(db: sqlite3.Connection, record: RunRecord, training_run_id: str) -> None:
    db.execute(
        "INSERT INTO runs (number, training_run_id, origin, metadata, retention_s)"
        " VALUES (?, ?, ?, ?, ?)",
        (
            record.number,
            training_run_id,
            record.origin,
            json.dumps(dict(record.metadata)),
            record.retention_s,
        ),
    )
    db.execute("INSERT INTO states VALUES (?, 0, 0, 0, 0, 0, 0, 0, 0, '')", (record.number,))
    set_state(db, record.number, record.state)


def set_metadata(db: sqlite3.Connection, run: int, metadata: Mapping[str, str]) -> None:
    content = json.dumps(dict(metadata))
    db.execute("UPDATE runs SET metadata = ? WHERE number = ?", (content, run))


def set_state(db: sqlite3.Connection, run: int, state: RunState) -> None:
    """Changes the state of a run, if it is still there."""
    gradient = state.gradient
    db.execute(
        "UPDATE states SET step = ?, writer_epoch = ?, acknowledged = ?, backward_count = ?,"
        " added = ?, failed_sequence = ?, update_time = ?, inexact_replays = ?, inexact_note = ?"
        " WHERE run = ?",
        (
            state.step,
            state.writer_epoch,
            state.acknowledged,
            gradient.backward_count,
            gradient.added,
            gradient.failed_sequence,
            state.update_time_s,
            state.inexact_replays,
            state.inexact_note,
            run,
        ),
    )


def accept(
    db: sqlite3.Connection, call: int, method: str, payload_hash: bytes, payload: bytes
) -> None:
    db.execute(
        "INSERT INTO calls (id, method, hash) VALUES (?, ?, ?)", (call, method, payload_hash)
    )
    db.execute("INSERT INTO payloads VALUES (?, ?)", (call, payload))


def end(
    db: sqlite3.Connection, call: int, effect: Effect, digest: int | None, answer: bytes
) -> None:
    db.execute(
        "UPDATE calls SET effect = ?, digest = ? WHERE id = ?", (effect, signed(digest), call)
    )
    db.execute("INSERT INTO answers VALUES (?, ?)", (call, answer))
    if effect not in (Effect.ADD, Effect.STEP):
        _release(db, [call])


def die(db: sqlite3.Connection, call: int) -> None:
    """Notes that an engine died with a call."""
    db.execute("UPDATE calls SET deaths = deaths + 1 WHERE id = ?", (call,))


def acknowledge(db: sqlite3.Connection, run: int, before: int, upto: int) -> None:
    """Drops the answers behind `before` up to `upto`, and calls of which nothing is needed."""
    span = key(run, before + 1), key(run, upto)
    db.execute("DELETE FROM answers WHERE id BETWEEN ? AND ?", span)
    db.execute("UPDATE states SET acknowledged = max(acknowledged, ?) WHERE run = ?", (upto, run))
    db.execute(
        "DELETE FROM calls WHERE id BETWEEN ? AND ? AND (effect = 0 OR id <= ?)"
        " AND id NOT IN (SELECT call FROM tiles WHERE call BETWEEN ? AND ?)",
        (*span, key(run, _covered(db, run)), *span),
    )


def add_plan(db: sqlite3.Connection, plan: int, tiles: Sequence[TileRecord]) -> None:
    db.executemany(
        "INSERT INTO tiles VALUES (?, ?, ?, ?, ?, ?)",
        [
            (plan, place, key(tile.run, tile.sequence), tile.tile, tile.first, tile.documents)
            for place, tile in enumerate(tiles)
        ],
    )


def cover(
    db: sqlite3.Connection, run: int, snapshot: SnapshotRecord, *, shared_plans: bool
) -> None:
    """Puts a snapshot in the place of the run's earlier one, and of the calls that are in it.

    With `shared_plans`, a plan keeps its documents until no run needs them.
    """
    db.execute(
        "REPLACE INTO snapshots VALUES (?, ?, ?, ?)",
        (run, snapshot.sequence, snapshot.file, snapshot.size_bytes),
    )
    _drop_tiles(db, key(run, 0), key(run, snapshot.sequence), shared_plans)


def remove_run(db: sqlite3.Connection, run: int, *, shared_plans: bool) -> None:
    """Removes all of a run that no other needs."""
    span = (key(run, 0), last_key(run))
    db.execute("UPDATE runs SET deleted = 1 WHERE number = ?", (run,))
    for table in ("states", "snapshots"):
        db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
    db.execute("DELETE FROM answers WHERE id BETWEEN ? AND ?", span)
    _drop_tiles(db, *span, shared_plans)


def add_request(db: sqlite3.Connection, request: RequestRecord) -> None:
    db.execute(
        "REPLACE INTO requests VALUES (?, ?, ?, ?, ?)",
        (
            request.tenant,
            request.request_id,
            request.payload_hash,
            request.answer,
            request.time_s,
        ),
    )


def forget_requests(db: sqlite3.Connection, before_s: float) -> None:
    db.execute("DELETE FROM requests WHERE time < ?", (before_s,))


def note_server(db: sqlite3.Connection, values: Mapping[str, str]) -> None:
    db.executemany("REPLACE INTO server VALUES (?, ?)", list(values.items()))


def _covered(db: sqlite3.Connection, run: int) -> int:
    found = db.execute("SELECT sequence FROM snapshots WHERE run = ?", (run,)).fetchone()
    return int(found[0]) if found else 0


def _drop_tiles(db: sqlite3.Connection, first: int, last: int, shared_plans: bool) -> None:
    """Drops what the calls from `first` to `last` were sent, which no replay of their run needs."""
    span = (first, last)
    if shared_plans:
        _drop_plans(db, first, last)
    else:
        db.execute("DELETE FROM tiles WHERE call BETWEEN ? AND ?", span)
    held = "id IN (SELECT call FROM tiles WHERE call BETWEEN ? AND ?)"
    db.execute(f"DELETE FROM payloads WHERE id BETWEEN ? AND ? AND NOT {held}", span * 2)
    found = db.execute(_ACKNOWLEDGED, (place(first)[0],)).fetchone()
    last_answered = min(last, key(place(first)[0], found[0])) if found else last
    done = (first, last_answered)
    db.execute(f"DELETE FROM calls WHERE id BETWEEN ? AND ? AND NOT {held}", done * 2)
    db.execute(
        "DELETE FROM runs WHERE deleted AND NOT EXISTS (SELECT 1 FROM calls WHERE id BETWEEN"
        f" number << {SEQUENCE_BITS} AND ((number + 1) << {SEQUENCE_BITS}) - 1)"
    )


def _drop_plans(db: sqlite3.Connection, first: int, last: int) -> None:
    """Drops the plans with tiles of these calls that no run needs, and what was sent for them."""
    for (plan,) in db.execute(PLANS_BETWEEN, (first, last)).fetchall():
        if not _needed(db, plan):
            calls = db.execute("SELECT DISTINCT call FROM tiles WHERE plan = ?", (plan,)).fetchall()
            db.execute("DELETE FROM tiles WHERE plan = ?", (plan,))
            _release(db, [call for (call,) in calls])


def _needed(db: sqlite3.Connection, plan: int) -> bool:
    """Whether a run would have to compute some of the plan again."""
    calls = db.execute("SELECT DISTINCT call FROM tiles WHERE plan = ?", (plan,)).fetchall()
    return any(_to_replay(db, call) for (call,) in calls)


def _to_replay(db: sqlite3.Connection, call: int) -> bool:
    """Whether a call has not ended, or would have to be computed again."""
    run, sequence = place(call)
    found = db.execute("SELECT effect FROM calls WHERE id = ?", (call,)).fetchone()
    if found is None or _is_deleted(db, run):
        return False
    if found[0] is None:
        return True
    return found[0] != Effect.NONE and sequence > _covered(db, run)


def _is_deleted(db: sqlite3.Connection, run: int) -> bool:
    found = db.execute("SELECT deleted FROM runs WHERE number = ?", (run,)).fetchone()
    return found is None or bool(found[0])


def _release(db: sqlite3.Connection, calls: Iterable[int]) -> None:
    """Drops what was sent with calls that need not be computed again, here or beside others; the
    calls too once they are acknowledged.
    """
    for call in calls:
        held = db.execute("SELECT 1 FROM tiles WHERE call = ? LIMIT 1", (call,)).fetchone()
        if held or _to_replay(db, call):
            continue
        db.execute("DELETE FROM payloads WHERE id = ?", (call,))
        run, sequence = place(call)
        found = db.execute(_ACKNOWLEDGED, (run,)).fetchone()
        if found is None or sequence <= found[0]:
            db.execute("DELETE FROM calls WHERE id = ?", (call,))

"""What is written and read, as SQL. Every function but `load_*` is run on the journal's thread."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from trainer_service.gradient import GradientCounts
from trainer_service.run import RunState

_SEQUENCE_BITS = 32
_SIGNED = 2**64  # SQLite's integers are signed


class Effect(IntEnum):
    """What a call that has ended did to its run's row."""

    NONE = 0
    ADD = 1  # to the gradient
    STEP = 2
    CLEAR = 3  # the gradient


@dataclass(frozen=True, slots=True)
class RunRecord:
    number: int
    origin: str  # JSON, see codec.py
    metadata: Mapping[str, str]
    retention_s: float
    state: RunState
    covered: int  # sequence of the last call in the snapshot; 0: there is none
    dirty: bool  # whether calls behind it have changed the row


@dataclass(frozen=True, slots=True)
class CallRecord:
    sequence: int
    method: str
    payload_hash: bytes
    deaths: int
    payload: bytes | None  # of calls that have not ended
    answer: bytes | None  # of the others, unless acknowledged


@dataclass(frozen=True, slots=True)
class TileRecord:
    """Documents `first` to `first + documents` of a call, computed in a plan."""

    run: int
    sequence: int
    tile: int
    first: int
    documents: int


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    sequence: int
    file: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    tenant: str
    request_id: str
    payload_hash: bytes
    answer: str  # JSON
    time_s: float


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call to be replayed."""

    sequence: int
    effect: Effect
    digest: int | None


@dataclass(frozen=True, slots=True)
class Payload:
    """What was sent with a call; see codec.py."""

    method: str
    payload_hash: bytes
    payload: bytes


def key(run: int, sequence: int) -> int:
    """A call's id."""
    return run << _SEQUENCE_BITS | sequence


def place(call: int) -> tuple[int, int]:
    """The run's number and the sequence of a call's id."""
    return call >> _SEQUENCE_BITS, call & ((1 << _SEQUENCE_BITS) - 1)


def _last(run: int) -> int:
    return key(run + 1, 0) - 1


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
    signed = digest - _SIGNED if digest is not None and digest >= _SIGNED // 2 else digest
    db.execute("UPDATE calls SET effect = ?, digest = ? WHERE id = ?", (effect, signed, call))
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
    span = (key(run, 0), _last(run))
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
        f" number << {_SEQUENCE_BITS} AND ((number + 1) << {_SEQUENCE_BITS}) - 1)"
    )


def _drop_plans(db: sqlite3.Connection, first: int, last: int) -> None:
    """Drops the plans with tiles of these calls that no run needs, and what was sent for them."""
    for (plan,) in db.execute(_PLANS_BETWEEN, (first, last)).fetchall():
        if not _needed(db, plan):
            calls = db.execute("SELECT DISTINCT call FROM tiles WHERE plan = ?", (plan,)).fetchall()
            db.execute("DELETE FROM tiles WHERE plan = ?", (plan,))
            _release(db, [call for (call,) in calls])


_ACKNOWLEDGED = "SELECT acknowledged FROM states WHERE run = ?"
_PLANS_BETWEEN = "SELECT DISTINCT plan FROM tiles WHERE call BETWEEN ? AND ?"


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


def load_server(db: sqlite3.Connection) -> dict[str, str]:
    """What was noted of the server that wrote the journal."""
    return dict(db.execute("SELECT name, value FROM server").fetchall())


def note_server(db: sqlite3.Connection, values: Mapping[str, str]) -> None:
    db.executemany("REPLACE INTO server VALUES (?, ?)", list(values.items()))


def load_runs(db: sqlite3.Connection) -> Iterator[RunRecord]:
    """All runs, oldest first."""
    rows = db.execute(
        "SELECT r.number, r.origin, r.metadata, r.retention_s, coalesce(x.sequence, 0),"
        " s.step, s.writer_epoch, s.acknowledged, s.backward_count, s.added, s.failed_sequence,"
        " s.update_time, s.inexact_replays, s.inexact_note"
        " FROM runs r JOIN states s ON s.run = r.number"
        " LEFT JOIN snapshots x ON x.run = r.number WHERE NOT r.deleted ORDER BY r.number"
    ).fetchall()
    for number, origin, metadata, retention_s, covered, *state in rows:
        step, writer_epoch, acknowledged, backward_count, added, failed, *rest = state
        yield RunRecord(
            number=number,
            origin=origin,
            metadata=json.loads(metadata),
            retention_s=retention_s,
            covered=covered,
            dirty=bool(load_past(db, number, covered)),
            state=RunState(
                step=step,
                writer_epoch=writer_epoch,
                acknowledged=acknowledged,
                gradient=GradientCounts(backward_count, added, failed),
                update_time_s=rest[0],
                inexact_replays=rest[1],
                inexact_note=rest[2],
            ),
        )


def load_calls(db: sqlite3.Connection, run: int, after: int) -> Iterator[CallRecord]:
    """The calls behind a number, in order: those that have not ended, and those with answers."""
    rows = db.execute(
        "SELECT c.id, c.method, c.hash, c.deaths, c.effect, p.payload, a.answer FROM calls c"
        " LEFT JOIN payloads p ON p.id = c.id AND c.effect IS NULL"
        " LEFT JOIN answers a ON a.id = c.id WHERE c.id BETWEEN ? AND ? ORDER BY c.id",
        (key(run, after + 1), _last(run)),
    )
    for call, method, payload_hash, deaths, _, payload, answer in rows:
        yield CallRecord(place(call)[1], method, payload_hash, deaths, payload, answer)


def load_requests(db: sqlite3.Connection) -> Iterator[RequestRecord]:
    """All that are remembered, oldest first."""
    for row in db.execute("SELECT * FROM requests ORDER BY time"):
        yield RequestRecord(*row)


def load_origin(db: sqlite3.Connection, run: int) -> str:
    """Of a run that may be deleted."""
    (origin,) = db.execute("SELECT origin FROM runs WHERE number = ?", (run,)).fetchone()
    return str(origin)


def load_snapshot(db: sqlite3.Connection, run: int) -> SnapshotRecord | None:
    found = db.execute(
        "SELECT sequence, file, size_bytes FROM snapshots WHERE run = ?", (run,)
    ).fetchone()
    return SnapshotRecord(*found) if found else None


def load_past(db: sqlite3.Connection, run: int, covered: int) -> list[PastCall]:
    """The calls that have changed the run's row since its snapshot, in order."""
    rows = db.execute(
        "SELECT id, effect, digest FROM calls WHERE id BETWEEN ? AND ? AND effect > 0 ORDER BY id",
        (key(run, covered + 1), _last(run)),
    )
    return [
        PastCall(place(call)[1], Effect(effect), None if digest is None else digest % _SIGNED)
        for call, effect, digest in rows
    ]


def load_plans(db: sqlite3.Connection, calls: Sequence[int]) -> dict[int, list[TileRecord]]:
    """The plans with tiles of any of the calls, in order, whole as far as they are kept."""
    plans: set[int] = set()
    for call in calls:
        plans.update(plan for (plan,) in db.execute(_PLANS_BETWEEN, (call, call)))
    found: dict[int, list[TileRecord]] = {}
    for plan in sorted(plans):
        rows = db.execute(
            "SELECT call, tile, first, documents FROM tiles WHERE plan = ? ORDER BY place", (plan,)
        )
        found[plan] = [TileRecord(*place(call), *rest) for call, *rest in rows]
    return found


def find_payload(db: sqlite3.Connection, run: int, sequence: int) -> Payload | None:
    """What was sent with a call, if it is still there."""
    found = db.execute(
        "SELECT c.method, c.hash, p.payload FROM calls c JOIN payloads p ON p.id = c.id"
        " WHERE c.id = ?",
        (key(run, sequence),),
    ).fetchone()
    return Payload(*found) if found else None


def next_plan(db: sqlite3.Connection) -> int:
    (last,) = db.execute("SELECT coalesce(max(plan), 0) FROM tiles").fetchone()
    return int(last) + 1


def next_number(db: sqlite3.Connection) -> int:
    (last,) = db.execute("SELECT coalesce(max(number), 0) FROM runs").fetchone()
    return int(last) + 1

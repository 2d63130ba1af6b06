"""What is read of the journal, as SQL."""

import json
import sqlite3
from collections.abc import Iterator, Sequence

from trainer_service.journal.records import (
    CallRecord,
    Effect,
    PastCall,
    Payload,
    RequestRecord,
    RunRecord,
    SnapshotRecord,
    TileRecord,
    key,
    last_key,
    place,
    unsigned,
)
from trainer_service.run.gradient import GradientCounts
from trainer_service.run.run import RunState

PLANS_BETWEEN = "SELECT DISTINCT plan FROM tiles WHERE call BETWEEN ? AND ?"


def load_server(db: sqlite3.Connection) -> dict[str, str]:
    """What was noted of the server that wrote the journal."""
    return dict(db.execute("SELECT name, value FROM server").fetchall())


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
        (key(run, after + 1), last_key(run)),
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
        (key(run, covered + 1), last_key(run)),
    )
    return [
        PastCall(place(call)[1], Effect(effect), unsigned(digest)) for call, effect, digest in rows
    ]


def load_plans(db: sqlite3.Connection, calls: Sequence[int]) -> dict[int, list[TileRecord]]:
    """The plans with tiles of any of the calls, in order, whole as far as they are kept."""
    plans: set[int] = set()
    for call in calls:
        plans.update(plan for (plan,) in db.execute(PLANS_BETWEEN, (call, call)))
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

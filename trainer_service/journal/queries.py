"""What is read of the journal, as SQL."""

import json
import sqlite3
from collections.abc import Iterator

from trainer_service.calls import Effect
from trainer_service.jobs import SavedRow
from trainer_service.journal import records
from trainer_service.run_description import Gradient, RunState


def load_server(db: sqlite3.Connection) -> dict[str, str]:
    """What was noted of the server that wrote the journal."""
    return dict(db.execute("SELECT name, value FROM server").fetchall())


def load_runs(db: sqlite3.Connection) -> Iterator[records.RunRecord]:
    """All runs, oldest first."""
    rows = db.execute(
        f"SELECT {', '.join(records.STATE_COLUMNS)}, number, training_run_id, origin, metadata,"
        " retention_s, removing FROM runs JOIN states ON run = number ORDER BY number"
    ).fetchall()
    for *state, number, run, origin, metadata, retention_s, removing in rows:
        values = (*state[:3], Gradient(*state[3:6]), *state[6:])
        yield records.RunRecord(
            number=number,
            training_run_id=run,
            origin=origin,
            metadata=json.loads(metadata),
            retention_s=retention_s,
            removing=None if removing is None else bool(removing),
            state=RunState(*values),
        )


def load_calls(db: sqlite3.Connection, run: int, after: int) -> Iterator[records.CallRecord]:
    """The calls behind a number, in order: those that have not ended, and those with answers."""
    rows = db.execute(
        "SELECT c.id, c.method, c.hash, c.mark, c.deaths,"
        # What is damaged may be of another type: it is for others to tell.
        " CAST(p.payload AS BLOB), CAST(a.answer AS BLOB) FROM calls c"
        " LEFT JOIN payloads p ON p.id = c.id AND c.effect IS NULL"
        " LEFT JOIN answers a ON a.id = c.id WHERE c.id BETWEEN ? AND ? ORDER BY c.id",
        (records.call_id(run, after + 1), records.last_id(run)),
    )
    for call, *rest in rows:
        yield records.CallRecord(records.sequence_of(call), *rest)


def load_requests(db: sqlite3.Connection) -> Iterator[records.RequestRecord]:
    """All that are remembered, oldest first."""
    for row in db.execute("SELECT * FROM requests ORDER BY time"):
        yield records.RequestRecord(*row)


def load_saved_row(db: sqlite3.Connection, run: int) -> SavedRow | None:
    found = db.execute(
        "SELECT sequence, file, size_bytes FROM saved_rows WHERE run = ?", (run,)
    ).fetchone()
    return SavedRow(*found) if found else None


def covered(db: sqlite3.Connection, run: int) -> int:
    """The last call that is in the run's saved row; 0: it is as it was created."""
    row = load_saved_row(db, run)
    return row.sequence if row else 0


def load_past(db: sqlite3.Connection, run: int) -> list[records.PastCall]:
    """The calls that have changed the run's row since it was saved, in order."""
    rows = db.execute(
        "SELECT id, effect, digest FROM calls WHERE id BETWEEN ? AND ? AND effect > 0 ORDER BY id",
        (records.call_id(run, covered(db, run) + 1), records.last_id(run)),
    )
    return [
        records.PastCall(records.sequence_of(call), Effect(effect), records.unsigned(digest))
        for call, effect, digest in rows
    ]


def find_payload(db: sqlite3.Connection, run: int, sequence: int) -> records.Payload | None:
    """What was sent with a call, if it is still there."""
    found = db.execute(
        "SELECT c.method, c.hash, CAST(p.payload AS BLOB) FROM calls c"
        " JOIN payloads p ON p.id = c.id WHERE c.id = ?",
        (records.call_id(run, sequence),),
    ).fetchone()
    return records.Payload(*found) if found else None

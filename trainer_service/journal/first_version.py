"""What journals of the first schema hold otherwise, brought to today's form when opened."""

import json
import sqlite3
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from mint_core import errors
from mint_core.rpc.errors import to_status
from mintrpc.v1 import trainer_pb2, types_pb2

_ERROR, _STATUS = b"E", b"S"  # before an error in JSON, and as a google.rpc.Status
_KINDS: Mapping[str, type[errors.MintError]] = {
    kind.__name__: kind
    for kind in (
        errors.InvalidRequest,
        errors.NotFound,
        errors.AlreadyExists,
        errors.FailedPrecondition,
        errors.ResourceExhausted,
        errors.Aborted,
        errors.Unauthenticated,
        errors.Unavailable,
        errors.Unimplemented,
        errors.EngineFault,
        errors.MintError,
    )
}


def keep_last_number(db: sqlite3.Connection) -> None:
    """Notes the highest number that a run has had, those included of which calls alone are left."""
    (last,) = db.execute(
        "SELECT max(coalesce((SELECT max(number) FROM runs), 0),"
        " coalesce((SELECT max(id) >> 32 FROM calls), 0),"
        " coalesce((SELECT max(id) >> 32 FROM answers), 0))"
    ).fetchone()
    if last:
        db.execute("REPLACE INTO server VALUES ('last_run', ?)", (str(last),))


def encode_answers(db: sqlite3.Connection) -> None:
    """Writes refusals, and the answers of requests that act once, as they are sent."""
    for table, column in (("answers", "answer"), ("payloads", "payload")):
        query = f"SELECT id, {column} FROM {table} WHERE substr({column}, 1, 1) = ?"
        for call, content in db.execute(query, (_ERROR,)).fetchall():
            encoded = _STATUS + to_status(_error(content[1:])).SerializeToString()
            db.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (encoded, call))
    for tenant, request_id, answer in db.execute(
        "SELECT tenant, request_id, answer FROM requests"
    ).fetchall():
        db.execute(
            "UPDATE requests SET answer = ? WHERE tenant = ? AND request_id = ?",
            (_response(json.loads(answer)), tenant, request_id),
        )


def _error(encoded: bytes) -> errors.MintError:
    content = json.loads(encoded)
    error = _KINDS[content["kind"]](content["message"])
    error.reason = content["reason"]
    error.metadata = content["metadata"]
    if isinstance(error, errors.InvalidRequest):
        error.field = content["field"]
    return error


def _response(view: dict[str, Any] | None) -> bytes:
    """The journal does not say which request it was. OpenTrainingRunResponse has the fields of the
    answers to create and update under the same numbers; readers pass over what is more.
    """
    if view is None:
        return b""
    return trainer_pb2.OpenTrainingRunResponse(
        training_run=_run(view, view["origin"]),
        writer_epoch=view["writer_epoch"],
        next_sequence=view["next_sequence"],
        step=view["step"],
        gradient_pending=view["gradient_pending"],
        backward_count=view["backward_count"],
    ).SerializeToString()


def _run(view: dict[str, Any], origin: dict[str, Any]) -> trainer_pb2.TrainingRun:
    spec, states = origin["spec"], trainer_pb2.TrainingRun
    told = f"weights lost: {view['lost']}" if view["lost"] else ""
    run = states(
        training_run_id=origin["training_run_id"],
        base_model=origin["base_model"],
        base_fingerprint=origin["base_fingerprint"],
        lora_config=types_pb2.LoraConfig(
            rank=spec["rank"],
            seed=spec["seed"],
            alpha=spec["alpha"],
            use_rslora=spec["use_rslora"],
            target_modules=spec["modules"],
        ),
        metadata=view["metadata"],
        step=view["step"],
        next_sequence=view["next_sequence"],
        gradient_pending=view["gradient_pending"],
        state=states.STATE_FAILED if view["lost"] else states.STATE_ACTIVE,
        state_message=told or "; ".join(filter(None, (view["trouble"], view["inexact_note"]))),
        trainable_parameter_count=origin["trainable_parameter_count"],
        trained_modules=spec["modules"],
        isolated=origin["isolated"],
        inexact_replay_count=view["inexact_replays"],
        kind=states.KIND_TRAINED,
    )
    run.create_time.FromDatetime(datetime.fromisoformat(origin["create_time"]))
    run.update_time.FromDatetime(datetime.fromisoformat(view["update_time"]))
    return run

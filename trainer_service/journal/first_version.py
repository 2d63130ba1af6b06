"""What journals of the first schema hold otherwise, brought to today's form when opened."""

import json
import sqlite3
from typing import Any

from google.protobuf.json_format import ParseDict

from mint_core import errors
from mint_core.rpc.errors import to_status
from mintrpc.v1 import trainer_pb2

_ERROR, _STATUS = b"E", b"S"  # before an error in JSON, and as a google.rpc.Status
_KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.MintError)
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
    content = view | {"training_run": _run(view, view["origin"])}
    response = trainer_pb2.OpenTrainingRunResponse()
    return ParseDict(content, response, ignore_unknown_fields=True).SerializeToString()


def _run(view: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """A TrainingRun as JSON: the fields that the two share with it, and the others."""
    spec, states = origin["spec"], trainer_pb2.TrainingRun
    told = f"weights lost: {view['lost']}" if view["lost"] else ""
    others = {
        "lora_config": spec | {"target_modules": spec["modules"]},
        "state": states.STATE_FAILED if view["lost"] else states.STATE_ACTIVE,
        "state_message": told or "; ".join(filter(None, (view["trouble"], view["inexact_note"]))),
        "trained_modules": spec["modules"],
        "inexact_replay_count": view["inexact_replays"],
        "kind": states.KIND_TRAINED,
    }
    return origin | view | others

"""How the journal's values lie on disk: requests as the contract's own messages, refusals as
google.rpc.Status, the rest as JSON. Nothing that runs when it is read.
"""

import json
from dataclasses import asdict
from datetime import datetime
from typing import Any

from mint_core.engine_host.pipe import ModelDescription
from mint_core.lora.spec import AdapterSpec
from mint_core.rpc.errors import Recorded
from trainer_service.calls import Call, Refused, Work
from trainer_service.errors import StateDamaged
from trainer_service.journal.records import Payload
from trainer_service.run_description import RunOrigin
from trainer_service.wire.replies import refused
from trainer_service.wire.requests import hash_of
from trainer_service.wire.sequenced_requests import parse_work, request_kind

_MESSAGE, _STATUS = b"M", b"S"  # before a payload: what it is


def encode_payload(call: Call) -> bytes:
    """What was sent with a call, or why its content was refused."""
    if isinstance(call.work, Refused):
        return _STATUS + refused(call.work.error, call.place.sequence)
    return _MESSAGE + call.payload


def content_of(payload: bytes) -> bytes:
    """The canonical request; empty if it was refused."""
    return payload[1:] if payload[:1] == _MESSAGE else b""


def is_as_sent(found: Payload) -> bool:
    """Whether a request is, to the bit, the one whose hash was taken. Of a refusal nobody knows."""
    if found.payload[:1] == _STATUS:
        return True
    kind = request_kind(found.method)
    return hash_of(kind, content_of(found.payload)) == found.payload_hash


def decode_payload(found: Payload, run: str, sequence: int, model: ModelDescription) -> Work:
    """What a call asked for. Raises StateDamaged if that is not what was sent."""
    damaged = StateDamaged(run, f"the journal has not what call {sequence} asked for, but damage")
    try:
        if found.payload[:1] == _STATUS:
            return Refused(Recorded(found.payload[1:]))
        if is_as_sent(found):
            return parse_work(found.method, content_of(found.payload), model)
    except Exception as error:
        raise damaged from error
    raise damaged


def encode_origin(origin: RunOrigin) -> str:
    return json.dumps(asdict(origin) | {"create_time": origin.create_time.isoformat()})


def decode_origin(encoded: str) -> RunOrigin:
    content: dict[str, Any] = json.loads(encoded)
    spec = content["spec"]
    return RunOrigin(
        **content
        | {
            "create_time": datetime.fromisoformat(content["create_time"]),
            "spec": AdapterSpec(**spec | {"modules": tuple(spec["modules"])}),
        }
    )

"""How the journal's values lie on disk: requests and answers as the contract's own messages, the
rest as JSON. Nothing that runs when it is read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message

from mint_core import errors
from mint_core.engine_host.pipe import ModelDescription
from mint_core.lora.spec import AdapterSpec
from mintrpc.v1 import trainer_pb2
from trainer_service.run.calls import (
    Call,
    Computed,
    Discarded,
    Loaded,
    Method,
    Outcome,
    Refused,
    Saved,
    Stepped,
    Work,
)
from trainer_service.run.run import RunOrigin, RunView
from trainer_service.wire import responses
from trainer_service.wire.sequenced_requests import parse_work

_ERROR = b"E"  # what follows is an error; else a message
_MESSAGE = b"M"
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


class _Answer(Protocol):
    """Makes the message that answers a call."""

    def __call__(self, outcome: Outcome) -> Message: ...


_ANSWERS: Mapping[Method, tuple[_Answer, type[Message]]] = {
    "Forward": (responses.forward_response, trainer_pb2.ForwardResponse),
    "ForwardBackward": (responses.forward_backward_response, trainer_pb2.ForwardBackwardResponse),
    "OptimStep": (responses.optim_step_response, trainer_pb2.OptimStepResponse),
    "DiscardGradient": (responses.discard_response, trainer_pb2.DiscardGradientResponse),
    "SaveState": (responses.save_state_response, trainer_pb2.SaveStateResponse),
    "SaveWeightsForSampler": (
        responses.save_for_sampler_response,
        trainer_pb2.SaveWeightsForSamplerResponse,
    ),
    "LoadState": (responses.load_state_response, trainer_pb2.LoadStateResponse),
}


def encode_request(call: Call) -> bytes:
    """What was sent with a call, or why its content was refused."""
    if isinstance(call.work, Refused):
        return _ERROR + _encode_error(call.work.error)
    return _MESSAGE + call.payload


def decode_request(method: Method, encoded: bytes, model: ModelDescription) -> Work:
    if encoded[:1] == _ERROR:
        return Refused(_decode_error(encoded[1:]))
    return parse_work(method, encoded[1:], model)


def payload(encoded: bytes) -> bytes:
    """The canonical request; empty if it was refused."""
    return encoded[1:] if encoded[:1] == _MESSAGE else b""


def encode_outcome(method: Method, outcome: Outcome) -> bytes:
    if isinstance(outcome, errors.MintError):
        return _ERROR + _encode_error(outcome)
    respond, _ = _ANSWERS[method]
    return _MESSAGE + respond(outcome).SerializeToString()


def decode_outcome(method: Method, encoded: bytes) -> Outcome:
    if encoded[:1] == _ERROR:
        return _decode_error(encoded[1:])
    _, kind = _ANSWERS[method]
    return _outcome(method, kind.FromString(encoded[1:]))


def _outcome(method: Method, message: Any) -> Outcome:
    match method:
        case "Forward" | "ForwardBackward":
            return Computed(
                logprobs=tuple(
                    np.frombuffer(output.logprobs.values, "<f4") for output in message.outputs
                ),
                metrics=dict(message.metrics),
            )
        case "OptimStep":
            return Stepped(step=message.step, metrics=dict(message.metrics))
        case "DiscardGradient":
            return Discarded(message.gradient_discarded)
        case "SaveState" | "SaveWeightsForSampler":
            return Saved(
                path=message.path,
                revision_path=message.revision_path,
                step=message.step,
                gradient_pending=getattr(message, "gradient_pending", False),
            )
        case "LoadState":
            return Loaded(
                step=message.step,
                revision_path=message.revision_path,
                gradient_discarded=message.gradient_discarded,
            )


def _encode_error(error: errors.MintError) -> bytes:
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS)
    content = {
        "kind": kind,
        "reason": error.reason,
        "message": error.message,
        "metadata": dict(error.metadata),
        "field": getattr(error, "field", ""),
    }
    return json.dumps(content).encode()


def _decode_error(encoded: bytes) -> errors.MintError:
    content = json.loads(encoded)
    error = _KINDS[content["kind"]](content["message"])
    error.reason = content["reason"]
    error.metadata = content["metadata"]
    if isinstance(error, errors.InvalidRequest):
        error.field = content["field"]
    return error


def encode_origin(origin: RunOrigin) -> str:
    return json.dumps(_origin_content(origin))


def decode_origin(encoded: str) -> RunOrigin:
    return _origin(json.loads(encoded))


def encode_view(view: RunView | None) -> str:
    """The answer of a request that acts once; None: it has no content."""
    if view is None:
        return "null"
    content = {entry.name: getattr(view, entry.name) for entry in fields(RunView)}
    content |= {
        "origin": _origin_content(view.origin),
        "metadata": dict(view.metadata),
        "update_time": view.update_time.isoformat(),
    }
    return json.dumps(content)


def decode_view(encoded: str) -> RunView | None:
    content = json.loads(encoded)
    if content is None:
        return None
    content["origin"] = _origin(content["origin"])
    content["update_time"] = datetime.fromisoformat(content["update_time"])
    return RunView(**content)


def _origin_content(origin: RunOrigin) -> dict[str, Any]:
    return asdict(origin) | {"create_time": origin.create_time.isoformat()}


def _origin(content: dict[str, Any]) -> RunOrigin:
    spec = content["spec"]
    return RunOrigin(
        **content
        | {
            "create_time": datetime.fromisoformat(content["create_time"]),
            "spec": AdapterSpec(**spec | {"modules": tuple(spec["modules"])}),
        }
    )

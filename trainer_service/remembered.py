"""Answers of requests that act once, as they are remembered: without what is large, and what the
run says of itself for as long as there is one.
"""

from collections.abc import Mapping

from mintrpc.v1.trainer_pb2 import OpenTrainingRunResponse  # has the fields of all the others
from trainer_service.run_description import RunOrigin
from trainer_service.wire.responses import lora_config_message

# What is large, and what is not the same when the request comes again.
_LEFT_OUT = ("metadata", "lora_config", "trained_modules", "group")


def brief(answer: bytes) -> bytes:
    """What is to be remembered of an answer."""
    response = OpenTrainingRunResponse.FromString(answer)
    for name in _LEFT_OUT:
        response.training_run.ClearField(name)
    return response.SerializeToString()


def run_of(kept: bytes) -> str:
    """The run that has the rest of an answer; empty: it was kept whole, by an earlier version."""
    run = OpenTrainingRunResponse.FromString(kept).training_run
    return "" if run.HasField("lora_config") else run.training_run_id


def whole(kept: bytes, origin: RunOrigin, metadata: Mapping[str, str]) -> bytes:
    """The answer again, from what is remembered."""
    response = OpenTrainingRunResponse.FromString(kept)
    response.training_run.lora_config.CopyFrom(lora_config_message(origin.spec))
    response.training_run.trained_modules.extend(origin.spec.modules)
    response.training_run.metadata.update(metadata)
    return response.SerializeToString(deterministic=True)

"""Answers of sequenced calls, as the bytes that are kept and sent."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from google.rpc import status_pb2

from checkpoint_store import SAMPLER_WEIGHTS, Manifest
from mint_core.errors import MintError
from mint_core.rpc.errors import recorded, to_status
from mintrpc.v1 import trainer_pb2, types_pb2
from trainer_service.calls import Reply
from trainer_service.jobs import Floats


def computed(
    logprobs: Sequence[Floats],  # per datum, [n] or [n, k]
    metrics: Mapping[str, float],
    *,
    backward: bool,
) -> bytes:
    response = trainer_pb2.ForwardBackwardResponse() if backward else trainer_pb2.ForwardResponse()
    for each in logprobs:  # in place: messages made apart would be copied once per level
        tensor = response.outputs.add().logprobs
        tensor.dtype = types_pb2.TENSOR_DTYPE_FLOAT32
        tensor.shape.extend(each.shape)
        tensor.values = np.ascontiguousarray(each, "<f4").tobytes()
    response.metrics.update(metrics)
    return response.SerializeToString()


def stepped(step: int, metrics: Mapping[str, float]) -> bytes:
    return trainer_pb2.OptimStepResponse(step=step, metrics=metrics).SerializeToString()


def discarded(gradient_discarded: bool) -> bytes:
    response = trainer_pb2.DiscardGradientResponse(gradient_discarded=gradient_discarded)
    return response.SerializeToString()


def saved(manifest: Manifest, *, gradient_pending: bool) -> bytes:
    path, revision_path, step = str(manifest.path), str(manifest.revision_path), manifest.step
    if manifest.kind == SAMPLER_WEIGHTS:
        return trainer_pb2.SaveWeightsForSamplerResponse(
            path=path, revision_path=revision_path, step=step
        ).SerializeToString()
    return trainer_pb2.SaveStateResponse(
        path=path, revision_path=revision_path, step=step, gradient_pending=gradient_pending
    ).SerializeToString()


def loaded(revision_path: str, step: int, *, gradient_discarded: bool) -> bytes:
    return trainer_pb2.LoadStateResponse(
        revision_path=revision_path, step=step, gradient_discarded=gradient_discarded
    ).SerializeToString()


def refused(error: MintError, sequence: int) -> bytes:
    """A google.rpc.Status."""
    return recorded(to_status(error), sequence)


def told_again(reply: Reply, sequence: int) -> Reply:
    """A reply that the journal has: of refusals, earlier versions did not note that they are."""
    if not reply.failed:
        return reply
    return replace(reply, content=recorded(status_pb2.Status.FromString(reply.content), sequence))

"""Requests of sequenced calls.

What is wrong with a call's content does not take its place away: it is the outcome of its number.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields as fields_of
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from checkpoint_store import SAMPLER_WEIGHTS, WEIGHTS
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import InvalidRequest, MintError
from mint_core.rpc.errors import domain_error
from mintrpc.v1 import trainer_pb2, types_pb2
from trainer_service import calls, jobs
from trainer_service.wire import fields
from trainer_service.wire.datums import parse_datum
from trainer_service.wire.requests import canonical, hash_of, parse_load, run_id

_LOSSES: Mapping[str, type[jobs.Loss]] = {
    "cross_entropy": jobs.CrossEntropy,
    "importance_sampling": jobs.ImportanceSampling,
    "ppo": jobs.Ppo,
    "cispo": jobs.Cispo,
    "dro": jobs.Dro,
    "gspo": jobs.Gspo,
}
_SCOPES = frozenset(trainer_pb2.LogprobScope.values())
N = TypeVar("N", bound=jobs.Loss | jobs.AdamParams)
ComputeRequest = trainer_pb2.ForwardRequest | trainer_pb2.ForwardBackwardRequest


def parse_call(
    request: Message,
    model: ModelDescription,
    refusals: Sequence[MintError] = (),  # of the content, from before it was parsed
    *,
    most_targets: int,  # at one position
) -> calls.Call:
    """Reads a sequenced request. Raises only what is wrong with its place.

    Clears in it what may differ in a repeat.
    """
    method = cast(calls.Method, request.DESCRIPTOR.name.removesuffix("Request"))
    place, payload = _place(request)
    work = calls.Refused(refusals[0]) if refusals else _work(method, request, model)
    work = _checked_width(work, most_targets)
    named = isinstance(work, calls.Save) and work.name is not None
    return calls.Call(place, method, work, payload, secrets.token_hex(16) if named else "")


def _checked_width(work: calls.Work, most: int) -> calls.Work:
    for index, document in enumerate(work.documents if isinstance(work, calls.Compute) else ()):
        if document.width and document.width[0] > most:
            field = f"data[{index}].loss_fn_inputs.target_tokens"
            return calls.Refused(
                InvalidRequest(
                    f"`{field}` has {document.width[0]} targets at each position but at most "
                    f"{most} are taken; leave out those of the least weight",
                    field=field,
                    max_targets=most,
                )
            )
    return work


def parse_work(method: calls.Method, payload: bytes, model: ModelDescription) -> calls.Work:
    """Reads the content of a call again from its payload."""
    return _work(method, request_kind(method).FromString(payload), model)


def request_kind(method: calls.Method) -> type[Message]:
    kind: type[Message] = getattr(trainer_pb2, f"{method}Request")
    return kind


def _work(method: calls.Method, request: Message, model: ModelDescription) -> calls.Work:
    try:
        return _PARSERS[method](request, model)
    except Exception as error:
        return calls.Refused(domain_error(error))


def _place(request: Any) -> tuple[calls.Place, bytes]:
    """The call's place and its payload, without what may differ in a repeat."""
    training_run_id = run_id(request.training_run_id)
    sequence = fields.within(request.sequence, "sequence", 1)
    writer_epoch = fields.within(request.writer_epoch, "writer_epoch", 1)
    acknowledged = fields.within(request.acknowledged_sequence, "acknowledged_sequence", 0)
    request.ClearField("writer_epoch")
    request.ClearField("acknowledged_sequence")
    payload = canonical(request)
    place = calls.Place(
        training_run_id=training_run_id,
        sequence=sequence,
        writer_epoch=writer_epoch,
        acknowledged_sequence=acknowledged,
        payload_hash=hash_of(type(request), payload),
    )
    return place, payload


def _parse_compute(request: ComputeRequest, model: ModelDescription) -> calls.Compute:
    if not request.data:
        raise InvalidRequest("`data` is empty; a batch needs at least one datum", field="data")
    scope = request.logprob_scope
    if scope not in _SCOPES:
        raise InvalidRequest(
            f"`logprob_scope` is {scope}, which this server does not know; use ALL or WEIGHTED",
            field="logprob_scope",
            value=scope,
        )
    loss = parse_loss(request)
    return calls.Compute(
        documents=tuple(
            parse_datum(datum, f"data[{index}]", loss, model)
            for index, datum in enumerate(request.data)
        ),
        loss=loss,
        backward=isinstance(request, trainer_pb2.ForwardBackwardRequest),
        weighted_only=scope == trainer_pb2.LOGPROB_SCOPE_WEIGHTED,
    )


def parse_loss(request: ComputeRequest) -> jobs.Loss:
    name = request.WhichOneof("loss_fn")
    if name is None:
        raise InvalidRequest(
            "no loss is set; set one of `cross_entropy`, `importance_sampling`, `ppo`, "
            "`cispo`, `dro`, `gspo`",
            field="loss_fn",
        )
    given = getattr(request, name)
    if name == "dro" and not given.HasField("beta"):
        raise InvalidRequest("`dro.beta` is missing; dro has no default for it", field="dro.beta")
    loss = _with_numbers(_LOSSES[name], given, name)
    if (
        isinstance(loss, jobs.Ppo | jobs.Cispo | jobs.Gspo)
        and loss.clip_high_threshold < loss.clip_low_threshold
    ):
        low, high = loss.clip_low_threshold, loss.clip_high_threshold
        raise InvalidRequest(
            f"`{name}.clip_high_threshold` is {high:g}, less than `clip_low_threshold` {low:g}; "
            "both are bounds of the ratio, such as 0.8 and 1.2",
            field=f"{name}.clip_high_threshold",
            clip_low_threshold=low,
            clip_high_threshold=high,
        )
    return loss


def parse_adam_params(given: types_pb2.AdamParams) -> jobs.AdamParams:
    return _with_numbers(jobs.AdamParams, given, "adam_params")


def _with_numbers(kind: type[N], given: Any, where: str) -> N:
    """A dataclass of the numbers that are given, and of its defaults."""
    numbers = {}
    for entry in fields_of(kind):
        default: Any = entry.default
        value = getattr(given, entry.name) if given.HasField(entry.name) else default
        below = 1.0 if entry.name in ("beta1", "beta2") else float("inf")
        numbers[entry.name] = fields.finite(value, f"{where}.{entry.name}", below=below)
    return kind(**numbers)


def _parse_step(request: trainer_pb2.OptimStepRequest, model: ModelDescription) -> calls.Step:
    count = request.backward_count if request.HasField("backward_count") else None
    if count is not None:
        fields.within(count, "backward_count", 0)
    return calls.Step(adam_params=parse_adam_params(request.adam_params), backward_count=count)


def _parse_save(request: trainer_pb2.SaveStateRequest, model: ModelDescription) -> calls.Save:
    return calls.Save(
        kind=WEIGHTS,
        name=fields.check_name(request.name),
        overwrite=request.overwrite,
        ttl_s=fields.ttl_s(request),
        metadata=fields.metadata(request.metadata),
    )


def _parse_save_for_sampler(
    request: trainer_pb2.SaveWeightsForSamplerRequest, model: ModelDescription
) -> calls.Save:
    return calls.Save(
        kind=SAMPLER_WEIGHTS,
        name=fields.check_name(request.name) if request.name else None,
        ttl_s=fields.ttl_s(request),
        metadata=fields.metadata(request.metadata),
    )


_PARSERS: dict[str, Callable[[Any, ModelDescription], calls.Work]] = {
    "Forward": _parse_compute,
    "ForwardBackward": _parse_compute,
    "OptimStep": _parse_step,
    "DiscardGradient": lambda request, model: calls.Discard(),
    "SaveState": _parse_save,
    "SaveWeightsForSampler": _parse_save_for_sampler,
    "LoadState": lambda request, model: parse_load(request.path, request.with_optimizer, "path"),
}

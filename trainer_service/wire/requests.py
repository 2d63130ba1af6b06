"""Requests about runs: protobuf in, frozen dataclasses out.

Here are all checks that need no state but the base model's description.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from google.protobuf.message import Message

from checkpoint_store import MERGED_WEIGHTS, WEIGHTS, parse_path
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import BaseModelNotFound, InvalidRequest, Unimplemented
from mint_core.lora.spec import DEFAULT_ALPHA, LoraRequest
from mintrpc.v1 import trainer_pb2, types_pb2
from trainer_service.calls import Load
from trainer_service.wire import fields
from trainer_service.wire.pages import PageRequest, parse_page

RunKind = Literal["trained", "uploaded"]

_KINDS: Mapping[int, RunKind] = {
    trainer_pb2.TrainingRun.KIND_TRAINED: "trained",
    trainer_pb2.TrainingRun.KIND_UPLOADED: "uploaded",
}
_SWITCHES = ("train_attn", "train_mlp", "train_unembed")
_EXPERTS = "train_experts"


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a request the same request when it is sent again."""

    request_id: str
    payload_hash: bytes

    def digest(self, tenant: str) -> str:
        """Of all of it, to be kept with what the request does."""
        content = f"{tenant}\0{self.request_id}\0".encode() + self.payload_hash
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRun:
    identity: Identity
    source: LoraRequest | Load
    metadata: Mapping[str, str]
    isolated: bool
    retention_s: float | None = None  # None: the server's


@dataclass(frozen=True, slots=True)
class OpenRun:
    training_run_id: str
    identity: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRuns:
    page: PageRequest
    kind: RunKind | None  # None: all
    metadata_filter: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRun:
    training_run_id: str
    identity: Identity
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteRun:
    training_run_id: str
    identity: Identity
    delete_checkpoints: bool


def canonical(request: Message) -> bytes:
    """The parsed request as bytes, which do not depend on how its sender ordered them."""
    return request.SerializeToString(deterministic=True)


def hash_of(kind: type[Message], content: bytes) -> bytes:
    """A digest of a request of that kind whose canonical bytes are `content`."""
    digest = hashlib.sha256(kind.DESCRIPTOR.full_name.encode())
    digest.update(content)
    return digest.digest()


def parse_create(
    request: trainer_pb2.CreateTrainingRunRequest, model: ModelDescription
) -> CreateRun:
    if request.base_model and request.base_model != model.name:
        raise BaseModelNotFound(request.base_model, model.name)
    return CreateRun(
        identity=identity_of(request),
        source=_source(request, model),
        metadata=fields.metadata(request.metadata),
        isolated=request.isolated,
        retention_s=fields.ttl_s(request, "retention"),
    )


def parse_open(request: trainer_pb2.OpenTrainingRunRequest) -> OpenRun:
    return OpenRun(run_id(request.training_run_id), identity_of(request))


def parse_list(request: trainer_pb2.ListTrainingRunsRequest) -> ListRuns:
    wanted = fields.metadata(request.metadata_filter, "metadata_filter")
    return ListRuns(
        page=parse_page(request, [request.kind, wanted]),
        kind=fields.kind(request.kind, _KINDS),
        metadata_filter=wanted,
    )


def parse_update(request: trainer_pb2.UpdateTrainingRunRequest) -> UpdateRun:
    return UpdateRun(
        training_run_id=run_id(request.training_run_id),
        identity=identity_of(request),
        metadata=fields.metadata(request.metadata),
    )


def parse_delete(request: trainer_pb2.DeleteTrainingRunRequest) -> DeleteRun:
    return DeleteRun(
        training_run_id=run_id(request.training_run_id),
        identity=identity_of(request),
        delete_checkpoints=request.delete_checkpoints,
    )


def run_id(value: str) -> str:
    return fields.check_name(fields.text(value, "training_run_id"), field="training_run_id")


def parse_load(path: str, with_optimizer: bool, field: str) -> Load:
    """Checks a checkpoint's path against what is wanted of it."""
    found = parse_path(path, field=field)
    if found.kind == MERGED_WEIGHTS:
        raise InvalidRequest(
            f"`{field}` {path!r} is a merged model; give the path of the adapter in it",
            field=field,
            path=path,
        )
    if with_optimizer and found.kind != WEIGHTS:
        raise InvalidRequest(
            f"`{field}` {path!r} is an adapter alone and has no optimizer state; give a `weights` "
            "path, or leave `with_optimizer` out",
            field=field,
            path=path,
        )
    return Load(path=path, with_optimizer=with_optimizer)


def parse_lora_config(config: types_pb2.LoraConfig, model: ModelDescription) -> LoraRequest:
    where = "lora_config"
    if not 1 <= config.rank <= model.max_lora_rank:
        raise InvalidRequest(
            f"`{where}.rank` is {config.rank} but must be 1 to {model.max_lora_rank}, the largest "
            "rank served here",
            field=f"{where}.rank",
            rank=config.rank,
            max_lora_rank=model.max_lora_rank,
        )
    alpha = config.alpha if config.HasField("alpha") else DEFAULT_ALPHA
    if fields.finite(alpha, f"{where}.alpha") == 0:
        raise InvalidRequest(
            f"`{where}.alpha` is 0, which would switch the adapter off; give a number above 0",
            field=f"{where}.alpha",
        )
    return LoraRequest(
        rank=config.rank,
        seed=config.seed if config.HasField("seed") else None,
        alpha=alpha,
        use_rslora=config.use_rslora,
        target_modules=_target_modules(config, f"{where}.target_modules"),
        **_switches(config, where, model),
    )


def _switches(config: types_pb2.LoraConfig, where: str, model: ModelDescription) -> dict[str, bool]:
    given = [name for name in (*_SWITCHES, _EXPERTS) if config.HasField(name)]
    if config.target_modules and given:
        raise InvalidRequest(
            f"`{where}.{given[0]}` and `{where}.target_modules` are both set; give one of them",
            field=f"{where}.{given[0]}",
        )
    switches = {name: getattr(config, name) if name in given else True for name in _SWITCHES}
    if not any(switches.values()):
        raise InvalidRequest(
            f"`{where}` trains nothing; set at least one of `train_attn`, `train_mlp`, "
            "`train_unembed`",
            field=where,
        )
    if not config.target_modules:
        _check_experts(config, where, model, switches["train_mlp"])
    return switches


def _check_experts(
    config: types_pb2.LoraConfig, where: str, model: ModelDescription, train_mlp: bool
) -> None:
    """Refuses experts that would have to be trained, said or unsaid."""
    wanted = config.train_experts if config.HasField(_EXPERTS) else None
    if model.routed is None:
        if wanted:
            raise InvalidRequest(
                f"`{where}.{_EXPERTS}` is true but {model.name} has no experts; leave it out",
                field=f"{where}.{_EXPERTS}",
            )
    elif wanted or (wanted is None and train_mlp):
        name = _EXPERTS if wanted else "train_mlp"
        raise Unimplemented(
            f"`{where}.{name}` would train the experts of {model.name}, which this server cannot "
            f"yet; set `{_EXPERTS}` to false to leave them out and train its other linear layers",
            feature=_EXPERTS,
            field=f"{where}.{name}",
        )


def _target_modules(config: types_pb2.LoraConfig, where: str) -> tuple[str, ...]:
    names, seen = tuple(config.target_modules), set[str]()
    for index, name in enumerate(names):
        fields.text(name, f"{where}[{index}]")
        if name in seen:
            raise InvalidRequest(
                f"`{where}` names {name!r} twice; name each module once",
                field=f"{where}[{index}]",
                module=name,
            )
        seen.add(name)
    return names


def _source(
    request: trainer_pb2.CreateTrainingRunRequest, model: ModelDescription
) -> LoraRequest | Load:
    match request.WhichOneof("source"):
        case "lora_config":
            return parse_lora_config(request.lora_config, model)
        case "checkpoint":
            source = request.checkpoint
            return parse_load(source.path, source.with_optimizer, "checkpoint.path")
        case _:
            raise InvalidRequest(
                "neither `lora_config` nor `checkpoint` is set; a run starts from one of them",
                field="source",
            )


def identity_of(request: Message, field: str = "request_id") -> Identity:
    request_id: str = request.request_id  # type: ignore[attr-defined]
    digest = hash_of(type(request), canonical(request))
    return Identity(fields.request_id(request_id, field), digest)

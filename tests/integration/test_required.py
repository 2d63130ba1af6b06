"""What the contract calls required is refused where it is absent, by its name; a request that has
that and no more is taken.
"""

import importlib
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mintrpc.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    trainer_pb2_grpc,
)
from tests.contract import messages
from tests.keys import make_key
from tests.servers import running_sampler, running_trainer
from tests.trainer_rpc import CALL_LIMIT_S, Refusal, create, refusal, tensor

Code = grpc.StatusCode
ENDS_THE_SERVER = "Drain"
UPLOAD = "UploadCheckpoint"  # whose request is a stream
POLICY = {"logprobs": tensor([-1.0] * 3, "float32"), "advantages": tensor([1.0] * 3, "float32")}
TARGETS = {"target_tokens": tensor([6, 7, 8], "int64")}
SCOPES = frozenset({"train", "sample", "read", "admin"})
# What is filled in as its comment, or that around it, says: tokens "in total", some change.
FILLED = {"EncodedTextChunk.tokens", "TextChunk.text", "UpdateCheckpointRequest.metadata"}
# What its comment says needs something else beside it.
NOT_ALONE = {"StreamSampleRequest.received"}
Place = tuple[str, ...]  # names of fields, from the outermost


@dataclass(frozen=True, slots=True)
class Stage:
    channels: dict[str, grpc.Channel]  # by service
    options: dict[str, Any]
    values: dict[str, Any]  # of fields that name something

    def send(self, method: MethodDescriptor, request: Message) -> Refusal | None:
        """What a request is refused for, on a run of its own where it names one."""
        given = type(request)()
        given.CopyFrom(request)
        fresh = {"request_id": uuid.uuid4().hex, "name": f"n{uuid.uuid4().hex}"}
        if given.DESCRIPTOR.fields_by_name.get("training_run_id"):
            fresh["training_run_id"] = create(self.trainer, self.options).id
        for field, _ in request.ListFields():
            if field.name in fresh:
                setattr(given, field.name, fresh[field.name])
        if method.name == "Sample":
            given.sampling_params.max_tokens = 2  # so that it ends soon
        return self.call(method, given)

    def call(self, method: MethodDescriptor, request: Any) -> Refusal | None:
        service = method.containing_service
        assert service is not None
        shape = [("unary", "stream")[s] for s in (method.client_streaming, method.server_streaming)]
        call = getattr(self.channels[service.name], "_".join(shape))(
            f"/{service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        try:
            answer = call(request, timeout=CALL_LIMIT_S, **self.options)
            if method.server_streaming:
                next(answer, None)
                answer.cancel()
        except grpc.RpcError as error:
            return refusal(error)
        return None

    @property
    def trainer(self) -> "trainer_pb2_grpc.TrainerServiceStub":
        return trainer_pb2_grpc.TrainerServiceStub(self.channels["TrainerService"])


@pytest.fixture(scope="module")
def stage(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("required")
    key = make_key("ann", folder / "keys", scopes=SCOPES)
    flags = {"keys": folder / "keys", "base_model_name": "tiny"}
    with (
        running_trainer(qwen3_folder, folder / "store", **flags) as trainer,
        running_sampler(qwen3_folder, folder / "store", **flags) as sampler,
        grpc.insecure_channel(trainer.address) as to_trainer,
        grpc.insecure_channel(sampler.address) as to_sampler,
    ):
        services = ("ModelService", "TrainerService", "CheckpointService", "AdminService")
        channels = {**dict.fromkeys(services, to_trainer), "SamplerService": to_sampler}
        options = {"metadata": [("authorization", f"Bearer {key}")]}
        run = create(trainer_pb2_grpc.TrainerServiceStub(to_trainer), options)
        state = run.send(run.save_state(name="a")).path
        adapter = run.send(run.save_for_sampler("a")).path
        tokenize = model_pb2_grpc.ModelServiceStub(to_trainer).Tokenize
        texts = ["a" * count for count in range(1, 100)]
        made = tokenize(model_pb2.TokenizeRequest(texts=texts), **options).sequences
        three = next(text for text, each in zip(texts, made, strict=True) if len(each.tokens) == 3)
        yield Stage(channels, options, {"path": state, "adapter": adapter, "text": three})


def methods() -> list[MethodDescriptor]:
    found = []
    for name in ("model", "trainer", "sampler", "checkpoint", "admin"):
        module = importlib.import_module(f"mintrpc.v1.{name}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            found += [m for m in service.methods if m.name not in (ENDS_THE_SERVER, UPLOAD)]
    return found


def is_required(field: FieldDescriptor) -> bool:
    assert field.containing_type is not None
    name = field.containing_type.full_name.removeprefix("mintrpc.v1.")
    member = next(m for m in messages()[name].members if m.name == field.name)
    return (member.oneof or member).required in ("yes", "in an upload")


def ours(field: FieldDescriptor) -> Descriptor | None:
    kind = field.message_type
    if kind is None or kind.GetOptions().map_entry:
        return None
    return kind if kind.full_name.startswith("mintrpc.") else None


def oneof_of(field: FieldDescriptor) -> str:
    """The oneof that it belongs to, unless that is how an optional field is written."""
    oneof = field.containing_oneof
    return "" if oneof is None or oneof.name == f"_{field.name}" else oneof.name


class Builder:
    """Makes messages that hold what is required and no more."""

    def __init__(self, stage: Stage) -> None:
        two = tensor([7, 8], "int64")
        del two.shape[:]
        two.shape.extend([2, 1])  # [prompt - 1, k]
        self._values: dict[str, Any] = {
            **dict.fromkeys(("sequence", "writer_epoch"), 1),
            "path": stage.values["path"],
            "TextChunk.text": stage.values["text"],
            "tokens": [5, 6, 7],
            "loss_fn_inputs": TARGETS,
            "rank": 4,
            "beta": 0.1,
            "target_prompt_logprobs": two,
            "ttl": {"seconds": 1000},
            "role": "assistant",
            "json_schema": "{}",
        }

    def samples(self, kind: Descriptor) -> list[Any]:
        """One, and others with what else its fields may hold: the other members of oneofs, and
        messages that may be left out.
        """
        base = GetMessageClass(kind)()
        variants: list[tuple[FieldDescriptor, Any]] = []
        for field in kind.fields:
            first, *others = self._holds(field)
            oneof = oneof_of(field)
            here = f"{kind.name}.{field.name}"
            if here in FILLED or (is_required(field) and not (oneof and base.WhichOneof(oneof))):
                self._set(base, field, first)
                variants += [(field, other) for other in others]
            elif oneof or (ours(field) and here not in NOT_ALONE):
                variants += [(field, value) for value in (first, *others)]
        made = [base]
        for field, value in variants:
            made.append(GetMessageClass(kind)())
            made[-1].CopyFrom(base)
            made[-1].ClearField(field.name)
            self._set(made[-1], field, value)
        return [self._with_inputs(message) for message in made]

    def _holds(self, field: FieldDescriptor) -> list[Any]:
        assert field.containing_type is not None
        for name in (f"{field.containing_type.name}.{field.name}", field.name):
            if name in self._values:
                return [self._values[name]]
        if (kind := ours(field)) is not None:
            return self.samples(kind)
        if field.message_type is not None:
            return [{}]
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            return ["a" if field.type == FieldDescriptor.TYPE_STRING else b"a"]
        return [1]

    def _set(self, message: Any, field: FieldDescriptor, value: Any) -> None:
        alone = field.is_repeated and isinstance(value, Message)
        message.MergeFrom(type(message)(**{field.name: [value] if alone else value}))
        if isinstance(value, Message) and not field.is_repeated:
            getattr(message, field.name).SetInParent()

    def _with_inputs(self, message: Any) -> Any:
        """Losses of a policy read more of a datum."""
        if "loss_fn" in message.DESCRIPTOR.oneofs_by_name and not message.HasField("cross_entropy"):
            for datum in message.data:
                for name, value in POLICY.items():
                    datum.loss_fn_inputs[name].CopyFrom(value)
        return message


def places(message: Any) -> Iterator[tuple[Place, str]]:
    """Where it holds something that is required, and in which oneof."""
    for field, value in message.ListFields():
        if is_required(field):
            yield (field.name,), oneof_of(field) or field.name
        if ours(field) is not None:
            inner = value[0] if field.is_repeated else value
            yield from (((field.name, *place), oneof) for place, oneof in places(inner))


def without(message: Any, place: Place) -> Any:
    given = type(message)()
    given.CopyFrom(message)
    holder = given
    for name in place[:-1]:
        holder = getattr(holder, name)
        holder = holder if isinstance(holder, Message) else holder[0]
    holder.ClearField(place[-1])
    return given


def is_named(refused: Refusal | None, place: Place, oneof: str) -> bool:
    """Whether a refusal is for what is absent there: by its name, or that of what it is part of."""
    if refused is None or refused.code != Code.INVALID_ARGUMENT:
        return False
    field = re.sub(r"\[\d+\]", "", refused.field)
    paths = [".".join(place), ".".join((*place[:-1], oneof))]
    return bool(field) and any(
        f".{path}." in f".{field}." or f".{field}." in f".{path}." for path in paths
    )


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_what_is_required_is_all_that_is(stage: Stage, method: MethodDescriptor) -> None:
    wrong, tried = [], set[tuple[Place, str]]()
    for request in Builder(stage).samples(method.input_type):
        if method.name == "StreamSample" and request.sample.HasField("target_prompt_logprobs"):
            continue  # "not in a stream"
        refused = stage.send(method, request)
        if refused is not None and refused.code == Code.UNIMPLEMENTED:
            continue  # images, which no server takes yet
        if refused is not None and refused.code == Code.INVALID_ARGUMENT:
            wrong.append(f"not taken: {refused.message}: {request}")
        for place, oneof in set(places(request)) - tried:
            tried.add((place, oneof))
            refused = stage.send(method, without(request, place))
            if not is_named(refused, place, oneof):
                wrong.append(f"without {'.'.join(place)}: {refused}")
    assert not wrong, "\n".join(wrong)


def test_what_is_required_of_an_upload(stage: Stage) -> None:
    stub = checkpoint_pb2_grpc.CheckpointServiceStub(stage.channels["CheckpointService"])
    wanted = checkpoint_pb2.DownloadCheckpointRequest(path=stage.values["adapter"])
    files: dict[str, list[Any]] = {}
    for piece in stub.DownloadCheckpoint(wanted, timeout=CALL_LIMIT_S, **stage.options):
        files.setdefault(piece.file.name, []).append(piece)
    files = {name: files[name] for name in ("adapter_config.json", "adapter_model.safetensors")}
    header = checkpoint_pb2.UploadHeader(
        request_id="a", name="up", files=[pieces[0].file for pieces in files.values()]
    )
    pieces = [
        checkpoint_pb2.UploadPiece(
            file_name=piece.file.name, offset_bytes=piece.offset_bytes, data=piece.data
        )
        for each in files.values()
        for piece in each
    ]

    def upload(header: Any, pieces: list[Any]) -> Refusal | None:
        header.request_id = header.request_id and uuid.uuid4().hex
        parts = [{"header": header}, *({"piece": piece} for piece in pieces)]
        requests = iter([checkpoint_pb2.UploadCheckpointRequest(**part) for part in parts])
        try:
            stub.UploadCheckpoint(requests, timeout=CALL_LIMIT_S, **stage.options)
        except grpc.RpcError as error:
            return refusal(error)
        return None

    assert upload(header, pieces) is None
    for place, oneof in set(places(header)):
        refused = upload(without(header, place), pieces)
        assert is_named(refused, place, oneof), (place, refused)
    first, *rest = pieces
    for place, oneof in places(first):
        refused = upload(header, [without(first, place), *rest])
        assert is_named(refused, place, oneof), (place, refused)

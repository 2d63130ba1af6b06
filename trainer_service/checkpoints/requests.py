"""Requests about checkpoints: protobuf in, frozen dataclasses out.

Here are all checks that need no state but the base model's description.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from checkpoint_store import (
    MERGED_WEIGHTS,
    SAMPLER_WEIGHTS,
    WEIGHTS,
    CheckpointKind,
    FileEntry,
    parse_path,
)
from checkpoint_store.adapter_files import CONFIG_FILE, OPTIMIZER_FILE, WEIGHTS_FILE
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import InvalidRequest, Unavailable, Unimplemented
from mintrpc.v1 import checkpoint_pb2
from trainer_service.wire import fields
from trainer_service.wire.pages import PageRequest, parse_page
from trainer_service.wire.requests import Identity, identity_of

KINDS: Mapping[int, CheckpointKind] = {
    checkpoint_pb2.CHECKPOINT_KIND_TRAINING: WEIGHTS,
    checkpoint_pb2.CHECKPOINT_KIND_SAMPLER: SAMPLER_WEIGHTS,
    checkpoint_pb2.CHECKPOINT_KIND_MERGED: MERGED_WEIGHTS,
}
_DTYPES: Mapping[int, str] = {
    checkpoint_pb2.EXPORT_DTYPE_UNSPECIFIED: "",
    checkpoint_pb2.EXPORT_DTYPE_FLOAT32: "float32",
    checkpoint_pb2.EXPORT_DTYPE_BFLOAT16: "bfloat16",
    checkpoint_pb2.EXPORT_DTYPE_FLOAT16: "float16",
}
SILENCE_LIMIT_S = 60.0  # between two messages of an upload
EXPORT_TTL = timedelta(hours=24)
_UPLOADED_FILES = (CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SHA256 = re.compile("[0-9a-f]{64}")
_ROOM_BYTES = 16 * 2**20  # for names and shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class ListCheckpoints:
    page: PageRequest
    training_run_id: str  # empty: of all runs
    kind: CheckpointKind | None
    metadata_filter: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCheckpoint:
    path: str
    identity: Identity
    changes_lifetime: bool
    expire_time: datetime | None  # None: kept until deleted
    metadata: Mapping[str, str] | None  # None: unchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCheckpoint:
    path: str
    identity: Identity
    name: str
    expire_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCheckpoint:
    path: str
    identity: Identity
    dtype: str  # empty: the base model's own
    expire_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    path: str
    file_name: str  # empty: all files
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    identity: Identity
    name: str
    files: Mapping[str, FileEntry]
    metadata: Mapping[str, str]
    expire_time: datetime | None
    base_model: str  # empty: what the adapter's configuration says


T = TypeVar("T")
Piece = tuple[str, int, bytes]  # name of a file, and where the bytes begin in it


def parse_list(request: checkpoint_pb2.ListCheckpointsRequest) -> ListCheckpoints:
    metadata = fields.metadata(request.metadata_filter, "metadata_filter")
    run = request.training_run_id
    return ListCheckpoints(
        page=parse_page(request, [run, request.kind, metadata]),
        training_run_id=fields.check_name(run, field="training_run_id") if run else "",
        kind=fields.kind(request.kind, KINDS),
        metadata_filter=metadata,
    )


def parse_get(request: checkpoint_pb2.GetCheckpointRequest) -> str:
    return _path(request.path)


def parse_update(request: checkpoint_pb2.UpdateCheckpointRequest) -> UpdateCheckpoint:
    lifetime = request.WhichOneof("lifetime")
    metadata = request.HasField("metadata")
    if lifetime == "keep" and not request.keep:
        raise InvalidRequest("`keep` is false; set it to true, or set `ttl`", field="keep")
    if lifetime is None and not metadata:
        raise InvalidRequest(
            "none of `ttl`, `keep` and `metadata` is set; say what is to change", field="metadata"
        )
    return UpdateCheckpoint(
        path=_path(request.path),
        identity=identity_of(request),
        changes_lifetime=lifetime is not None,
        expire_time=_expire_time(request),
        metadata=fields.metadata(request.metadata.entries) if metadata else None,
    )


def parse_copy(request: checkpoint_pb2.CopyCheckpointRequest) -> CopyCheckpoint:
    return CopyCheckpoint(
        path=_path(request.path),
        identity=identity_of(request),
        name=fields.check_name(request.name),
        expire_time=_expire_time(request),
    )


def parse_delete(request: checkpoint_pb2.DeleteCheckpointRequest) -> tuple[str, Identity]:
    return _path(request.path), identity_of(request)


def parse_export(request: checkpoint_pb2.ExportCheckpointRequest) -> ExportCheckpoint:
    if request.dtype not in _DTYPES:
        raise Unimplemented(f"`dtype` {request.dtype} is unknown to this server", field="dtype")
    path = parse_path(request.path)
    what = "an unnamed snapshot; copy it under a name and export that" if path.unnamed else ""
    if path.kind == MERGED_WEIGHTS:
        what = "a merged model already; give that of an adapter"
    if what:
        raise InvalidRequest(f"`path` {request.path!r} is {what}", field="path")
    return ExportCheckpoint(
        path=request.path,
        identity=identity_of(request),
        dtype=_DTYPES[request.dtype],
        expire_time=_expire_time(request) or datetime.now(UTC) + EXPORT_TTL,
    )


def parse_download(request: checkpoint_pb2.DownloadCheckpointRequest) -> Download:
    if request.offset_bytes and not request.file_name:
        raise InvalidRequest(
            "`offset_bytes` is set and `file_name` is not; say in which file to start",
            field="file_name",
        )
    return Download(
        path=_path(request.path),
        file_name=request.file_name,
        offset_bytes=fields.within(request.offset_bytes, "offset_bytes", 0),
    )


async def parse_upload(
    requests: AsyncIterator[checkpoint_pb2.UploadCheckpointRequest], model: ModelDescription
) -> tuple[Upload, AsyncIterator[Piece]]:
    """Reads the header, and leaves the pieces to be read."""
    first = await next_message(requests, "header")
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidRequest("the first message has no `header`; send it first", field="header")
    return _header(first.header, model), _pieces(requests)


async def next_message(messages: AsyncIterator[T], what: str) -> T | None:
    """The next one, if there is one. Raises Unavailable when it does not come."""
    try:
        async with asyncio.timeout(SILENCE_LIMIT_S):
            return await anext(messages, None)
    except TimeoutError:
        raise Unavailable(
            f"no {what} of the upload has come for {SILENCE_LIMIT_S:.0f} s; send it again"
        ) from None


async def _pieces(
    requests: AsyncIterator[checkpoint_pb2.UploadCheckpointRequest],
) -> AsyncIterator[Piece]:
    async for request in requests:
        if request.WhichOneof("part") != "piece":
            raise InvalidRequest(
                "a message behind the first has no `piece`; send the header once", field="piece"
            )
        piece = request.piece
        yield piece.file_name, piece.offset_bytes, piece.data


def _header(header: checkpoint_pb2.UploadHeader, model: ModelDescription) -> Upload:
    return Upload(
        identity=identity_of(header, "header.request_id"),
        name=fields.check_name(header.name, field="header.name"),
        files=_files(header, model),
        metadata=fields.metadata(header.metadata, "header.metadata"),
        expire_time=_expire_time(header),
        base_model=header.base_model,
    )


def _files(header: checkpoint_pb2.UploadHeader, model: ModelDescription) -> Mapping[str, FileEntry]:
    most_bytes = _most_bytes(model)
    files: dict[str, FileEntry] = {}
    for index, file in enumerate(header.files):
        where = f"header.files[{index}]"
        _check_file_name(file.name, where)
        if file.name in files:
            raise InvalidRequest(
                f"`header.files` names `{file.name}` twice; name each file once", field=where
            )
        if not 1 <= file.size_bytes <= most_bytes[file.name]:
            raise InvalidRequest(
                f"`{file.name}` has {file.size_bytes} bytes but must have 1 to "
                f"{most_bytes[file.name]}, what the largest adapter of {model.name!r} takes",
                field=f"{where}.size_bytes",
                file=file.name,
            )
        if _SHA256.fullmatch(file.sha256) is None:
            raise InvalidRequest(
                f"`sha256` of `{file.name}` is {file.sha256[:80]!r}; give 64 hexadecimal digits, "
                "in small letters",
                field=f"{where}.sha256",
                file=file.name,
            )
        files[file.name] = FileEntry(file.size_bytes, file.sha256)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise InvalidRequest(
                f"`header.files` lacks `{name}`; an adapter has `{CONFIG_FILE}` and "
                f"`{WEIGHTS_FILE}`",
                field="header.files",
                file=name,
            )
    return files


def _check_file_name(name: str, where: str) -> None:
    if name in _UPLOADED_FILES:
        return
    problem = "does not belong to an adapter"
    if name.endswith(_PICKLES):
        problem = "is a pickle by its name, which could run code: save safetensors instead"
    raise InvalidRequest(
        f"`{name}` {problem}; the files taken are {', '.join(_UPLOADED_FILES)}",
        field=f"{where}.name",
        file=name,
    )


def _most_bytes(model: ModelDescription) -> Mapping[str, int]:
    """What the largest adapter's files take, in float64 and with PEFT's copies of embedding and
    head.
    """
    numbers = model.max_lora_rank * sum(out + width for out, width in model.linear_shapes)
    widest = max((width for _, width in model.linear_shapes), default=0)
    return {
        CONFIG_FILE: 2**20,
        WEIGHTS_FILE: 8 * (numbers + 2 * model.vocabulary_size * widest) + _ROOM_BYTES,
        OPTIMIZER_FILE: 8 * 2 * numbers + _ROOM_BYTES,
    }


def _path(path: str) -> str:
    parse_path(path)
    return path


def _expire_time(request: object) -> datetime | None:
    ttl_s = fields.ttl_s(request)
    return None if ttl_s is None else datetime.now(UTC) + timedelta(seconds=ttl_s)

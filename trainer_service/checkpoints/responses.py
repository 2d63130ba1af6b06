"""Answers about checkpoints: dataclasses in, protobuf out."""

from collections.abc import Mapping

from checkpoint_store import FileEntry, Manifest
from mintrpc.v1 import checkpoint_pb2
from trainer_service.checkpoints.downloads import FilePiece
from trainer_service.checkpoints.exports import Progress
from trainer_service.checkpoints.requests import KINDS
from trainer_service.wire.pages import Page
from trainer_service.wire.responses import lora_config_message

_NAMES = {kind: checkpoint_pb2.CheckpointKind.Name(number) for number, kind in KINDS.items()}


def list_response(page: Page[Manifest]) -> checkpoint_pb2.ListCheckpointsResponse:
    return checkpoint_pb2.ListCheckpointsResponse(
        checkpoints=[checkpoint_message(manifest) for manifest in page.entries],
        next_page_token=page.next_page_token,
        total_size=page.total_size,
    )


def export_response(manifest: Manifest) -> checkpoint_pb2.ExportCheckpointResponse:
    return checkpoint_pb2.ExportCheckpointResponse(
        path=str(manifest.revision_path),
        files=_files(manifest.files),
        checkpoint=checkpoint_message(manifest),
        head_untied=manifest.head_untied,
    )


def download_response(piece: FilePiece) -> checkpoint_pb2.DownloadCheckpointResponse:
    name, entry, offset_bytes, data = piece
    return checkpoint_pb2.DownloadCheckpointResponse(
        file=_file(name, entry), offset_bytes=offset_bytes, data=data
    )


def checkpoint_message(manifest: Manifest) -> checkpoint_pb2.Checkpoint:
    return checkpoint_pb2.Checkpoint(
        path=str(manifest.path),
        revision_path=str(manifest.revision_path),
        kind=_NAMES[manifest.kind],
        training_run_id=manifest.training_run_id,
        create_time=manifest.create_time,
        expire_time=manifest.expire_time if manifest.named else None,
        size_bytes=manifest.size_bytes,
        base_model=manifest.base_model,
        base_fingerprint=manifest.base_fingerprint,
        lora_config=lora_config_message(manifest.spec),
        step=manifest.step,
        metadata=manifest.metadata,
        files=_files(manifest.files),
        source_path=manifest.source,
    )


def _files(files: Mapping[str, FileEntry]) -> list[checkpoint_pb2.CheckpointFile]:
    return [_file(name, entry) for name, entry in files.items()]


def _file(name: str, entry: FileEntry) -> checkpoint_pb2.CheckpointFile:
    return checkpoint_pb2.CheckpointFile(
        name=name, size_bytes=entry.size_bytes, sha256=entry.sha256
    )


def get_export_response(progress: Progress) -> checkpoint_pb2.GetExportResponse:
    response = checkpoint_pb2.GetExportResponse(written_bytes=progress.written_bytes or 0)
    if progress.made is not None:
        response.state = checkpoint_pb2.EXPORT_STATE_DONE
        response.export.CopyFrom(export_response(progress.made))
    elif progress.written_bytes is not None:
        response.state = checkpoint_pb2.EXPORT_STATE_MERGING
    else:
        response.state = checkpoint_pb2.EXPORT_STATE_WAITING
    return response

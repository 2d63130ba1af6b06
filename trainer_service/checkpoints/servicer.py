"""The RPCs of CheckpointService."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from mint_core.rpc.caller import caller
from mint_core.rpc.quotas import Account, QuotaBook
from mintrpc.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from trainer_service.checkpoints import requests, responses
from trainer_service.checkpoints.archive import Archive
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.checkpoints.downloads import pieces
from trainer_service.checkpoints.exports import Exports
from trainer_service.checkpoints.owners import owner_of
from trainer_service.checkpoints.responses import checkpoint_message
from trainer_service.checkpoints.uploads import Uploads
from trainer_service.groups.groups import Groups
from trainer_service.wire.fields import request_id


class CheckpointServicer(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """Parses, asks, answers."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        groups: Groups,
        quotas: QuotaBook,
        ids: Account,
        *,
        threads: int,
    ) -> None:
        """`ids` counts request ids; `threads` are those of a merge."""
        self._store = checkpoints.store
        self._archive = Archive(checkpoints, ids)
        self._uploads = Uploads(checkpoints, ids)
        self._exports = Exports(checkpoints, quotas, ids, threads=threads)
        self._groups = groups

    async def ListCheckpoints(
        self, request: checkpoint_pb2.ListCheckpointsRequest, context: Any
    ) -> checkpoint_pb2.ListCheckpointsResponse:
        """See checkpoint.proto."""
        tenant = caller().tenant
        page = await self._archive.list(tenant, requests.parse_list(request))
        return await self._store.in_turn(tenant, responses.list_response, page)

    async def GetCheckpoint(
        self, request: checkpoint_pb2.GetCheckpointRequest, context: Any
    ) -> checkpoint_pb2.GetCheckpointResponse:
        """See checkpoint.proto."""
        tenant = owner_of(request)
        path, for_sampler = requests.parse_get(request), bool(request.for_tenant)
        manifest = await self._archive.get(tenant, path, used=for_sampler)
        return checkpoint_pb2.GetCheckpointResponse(checkpoint=checkpoint_message(manifest))

    async def UpdateCheckpoint(
        self, request: checkpoint_pb2.UpdateCheckpointRequest, context: Any
    ) -> checkpoint_pb2.UpdateCheckpointResponse:
        """See checkpoint.proto."""
        manifest = await self._archive.update(caller().tenant, requests.parse_update(request))
        return checkpoint_pb2.UpdateCheckpointResponse(checkpoint=checkpoint_message(manifest))

    async def CopyCheckpoint(
        self, request: checkpoint_pb2.CopyCheckpointRequest, context: Any
    ) -> checkpoint_pb2.CopyCheckpointResponse:
        """See checkpoint.proto."""
        manifest = await self._archive.copy(caller().tenant, requests.parse_copy(request))
        return checkpoint_pb2.CopyCheckpointResponse(checkpoint=checkpoint_message(manifest))

    async def DeleteCheckpoint(
        self, request: checkpoint_pb2.DeleteCheckpointRequest, context: Any
    ) -> checkpoint_pb2.DeleteCheckpointResponse:
        """See checkpoint.proto."""
        await self._archive.delete(caller().tenant, *requests.parse_delete(request))
        return checkpoint_pb2.DeleteCheckpointResponse()

    async def ExportCheckpoint(
        self, request: checkpoint_pb2.ExportCheckpointRequest, context: Any
    ) -> checkpoint_pb2.ExportCheckpointResponse:
        """See checkpoint.proto."""
        parsed = requests.parse_export(request)
        manifest = await self._exports.export(caller().tenant, parsed, self._groups.model)
        return responses.export_response(manifest)

    async def GetExport(
        self, request: checkpoint_pb2.GetExportRequest, context: Any
    ) -> checkpoint_pb2.GetExportResponse:
        """See checkpoint.proto."""
        named = request_id(request.request_id)
        progress = await self._exports.progress(caller().tenant, named)
        return responses.get_export_response(progress)

    async def DownloadCheckpoint(
        self, request: checkpoint_pb2.DownloadCheckpointRequest, context: Any
    ) -> AsyncIterator[checkpoint_pb2.DownloadCheckpointResponse]:
        """See checkpoint.proto."""
        tenant, parsed = owner_of(request), requests.parse_download(request)
        async with aclosing(pieces(self._store, tenant, parsed)) as wanted:
            async for piece in wanted:
                yield responses.download_response(piece)

    async def UploadCheckpoint(
        self, request: AsyncIterator[checkpoint_pb2.UploadCheckpointRequest], context: Any
    ) -> checkpoint_pb2.UploadCheckpointResponse:
        """See checkpoint.proto."""
        model = self._groups.model
        upload, sent = await requests.parse_upload(request, model)
        manifest = await self._uploads.receive(caller().tenant, upload, sent, model)
        checkpoint = checkpoint_message(manifest)
        return checkpoint_pb2.UploadCheckpointResponse(checkpoint=checkpoint)

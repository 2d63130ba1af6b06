"""Merged models: made by a process that ends with its work, and kept in the store."""

import asyncio
from contextlib import suppress
from pathlib import Path

from checkpoint_store import MERGED_WEIGHTS, Manifest, OpenCheckpoint, new_manifest
from mint_core.engine_host.pipe import ModelDescription
from mint_core.rpc.model_service import tokenizer_files
from trainer_service.checkpoints.apart import Merge, do_apart
from trainer_service.checkpoints.checkpoints import Checkpoints, check_base
from trainer_service.checkpoints.downloads import stored
from trainer_service.checkpoints.requests import ExportCheckpoint
from trainer_service.checkpoints.staging import staging
from trainer_service.wire.idempotency import Once

MODULE = "trainer_service.engine.merging"


class Exports:
    """One at a time, since each takes a model's memory. All methods belong to one event loop."""

    def __init__(self, checkpoints: Checkpoints, *, threads: int) -> None:
        self._store = checkpoints.store
        self._sweeper = checkpoints.sweeper
        self._threads = threads
        self._once = Once()
        self._turn = asyncio.Lock()

    async def export(
        self, tenant: str, request: ExportCheckpoint, model: ModelDescription
    ) -> Manifest:
        """Makes a merged model. The same request makes it once."""
        return await self._once.run(
            tenant, request.identity, lambda: self._export(tenant, request, model)
        )

    async def _export(
        self, tenant: str, request: ExportCheckpoint, model: ModelDescription
    ) -> Manifest:
        digest = request.identity.digest(tenant)
        async with self._turn:
            made = await asyncio.to_thread(self._store.made, request.path, MERGED_WEIGHTS, digest)
            if made is not None:  # before a restart
                return made
            source = await stored(self._store, tenant, request.path)  # the merge reads files
            await asyncio.to_thread(source.note_use)
            await asyncio.to_thread(self._store.verify, source)
            check_base(source.manifest, model.name, model.fingerprint)
            async with staging(self._store) as folder:
                job = Merge(
                    base_folder=model.folder,
                    adapter_folder=str(source.folder),
                    spec=source.manifest.spec,
                    output_folder=str(folder),
                    dtype=request.dtype,
                    threads=self._threads,
                )
                head_untied = await do_apart(MODULE, job)
                await asyncio.to_thread(_add_tokenizer, folder, model.folder)
                manifest = _manifest(source, request, digest, head_untied)
                manifest = await asyncio.to_thread(self._store.publish_folder, manifest, folder)
        self._sweeper.note_expiry(request.expire_time)
        return manifest


def _manifest(
    source: OpenCheckpoint, request: ExportCheckpoint, digest: str, head_untied: bool
) -> Manifest:
    adapter = source.manifest
    return new_manifest(
        adapter.name,
        Manifest(
            training_run_id=adapter.training_run_id,
            kind=MERGED_WEIGHTS,
            tenant=adapter.tenant,
            base_model=adapter.base_model,
            base_fingerprint=adapter.base_fingerprint,
            spec=adapter.spec,
            step=adapter.step,
            metadata=adapter.metadata,
            expire_time=request.expire_time,
            source=str(adapter.revision_path),
            request=digest,
            head_untied=head_untied,
        ),
    )


def _add_tokenizer(folder: Path, base_folder: str) -> None:
    """Other engines want it beside the weights. What the merge has written stays."""
    for file in tokenizer_files(base_folder):
        with suppress(FileExistsError), (folder / file.name).open("xb") as opened:
            opened.write(file.content)

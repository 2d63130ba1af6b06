"""Adapters from elsewhere: received beside the store, checked whole, and only then kept."""

import hashlib
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path

from checkpoint_store import SAMPLER_WEIGHTS, WEIGHTS, FileEntry, Manifest, new_manifest
from checkpoint_store.adapter_files import OPTIMIZER_FILE
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import InvalidRequest
from mint_core.rpc.quotas import Account
from trainer_service.checkpoints.apart import Convert, do_apart
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.checkpoints.requests import Piece, Upload, next_message
from trainer_service.checkpoints.staging import staging
from trainer_service.errors import RequestIdReused
from trainer_service.uploaded_runs import uploaded_run_id
from trainer_service.wire.idempotency import Once

MODULE = "trainer_service.checkpoints.conversion"


class Uploads:
    """All methods belong to one event loop."""

    def __init__(self, checkpoints: Checkpoints, ids: Account) -> None:
        self._store = checkpoints.store
        self._sweeper = checkpoints.sweeper
        self._once = Once(ids, goes_on=False)

    async def receive(
        self, tenant: str, upload: Upload, pieces: AsyncIterator[Piece], model: ModelDescription
    ) -> Manifest:
        """Makes a checkpoint, in a run of its own. The same request makes it once."""
        size_bytes = sum(entry.size_bytes for entry in upload.files.values())
        async with staging(self._store, tenant, size_bytes) as folder:
            files, run = _Files(folder, upload.files), partial(self._store.in_turn, tenant)
            while (piece := await next_message(pieces, "piece")) is not None:
                await run(files.write, *piece)
            files.check_whole()
            try:
                return await self._once.run(
                    tenant, upload.identity, lambda: self._keep(tenant, upload, folder, model)
                )
            finally:  # others who have sent the same may wait for what becomes of these files
                await self._once.ended(tenant, upload.identity)

    async def _keep(
        self, tenant: str, upload: Upload, folder: Path, model: ModelDescription
    ) -> Manifest:
        run = uploaded_run_id(tenant, upload.identity.request_id)
        request = upload.identity.digest(tenant)
        for earlier in await self._store.in_turn(
            tenant, self._store.list, tenant=tenant, training_run_id=run
        ):
            if not earlier.source and earlier.request != request:  # before a restart
                raise RequestIdReused(upload.identity.request_id)
        async with staging(self._store, tenant) as output:
            job = Convert(
                folder=str(folder),
                output_folder=str(output),
                model=model,
                base_model=upload.base_model,
            )
            spec, step, files = await do_apart(MODULE, job)
            manifest = new_manifest(
                upload.name,
                Manifest(
                    training_run_id=run,
                    kind=WEIGHTS if OPTIMIZER_FILE in files else SAMPLER_WEIGHTS,
                    tenant=tenant,
                    base_model=model.name,
                    base_fingerprint=model.fingerprint,
                    spec=spec,
                    step=step,
                    metadata=upload.metadata,
                    expire_time=upload.expire_time,
                    request=request,
                    files=files,
                ),
            )
            manifest = await self._store.in_turn(
                tenant, self._store.publish_folder, manifest, output, overwrite=False
            )
        self._sweeper.note_expiry(upload.expire_time)
        return manifest


class _Files:
    """The files of an upload as they grow."""

    def __init__(self, folder: Path, announced: Mapping[str, FileEntry]) -> None:
        self._folder = folder
        self._announced = announced
        self._sizes = dict.fromkeys(announced, 0)
        self._digests = {name: hashlib.sha256() for name in announced}

    def write(self, name: str, offset_bytes: int, data: bytes) -> None:
        if name not in self._announced:
            raise InvalidRequest(
                f"a piece is of `{name}`, which the header does not name", field="piece.file_name"
            )
        if not data:  # or a call that sends nothing would never end
            raise InvalidRequest(f"a piece of `{name}` is empty; leave it out", field="piece.data")
        if offset_bytes != self._sizes[name]:
            raise InvalidRequest(
                f"a piece of `{name}` starts at byte {offset_bytes} where "
                f"{self._sizes[name]} comes next; send pieces in order, without gaps",
                field="piece.offset_bytes",
                file=name,
            )
        self._sizes[name] += len(data)
        if self._sizes[name] > self._announced[name].size_bytes:
            raise self._torn(name)
        self._digests[name].update(data)
        with (self._folder / name).open("ab") as file:
            file.write(data)

    def check_whole(self) -> None:
        for name, entry in self._announced.items():
            if self._sizes[name] != entry.size_bytes:
                raise self._torn(name)
            if self._digests[name].hexdigest() != entry.sha256:
                raise InvalidRequest(
                    f"`{name}` does not match the SHA-256 of the header; send it again",
                    field=name,
                )

    def _torn(self, name: str) -> InvalidRequest:
        return InvalidRequest(
            f"`{name}` has {self._sizes[name]} bytes or more where the header says "
            f"{self._announced[name].size_bytes}; send the whole file, unchanged",
            field=name,
        )

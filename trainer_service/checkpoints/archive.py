"""The tenants' checkpoints, as CheckpointService manages them.

The store blocks, so threads wait for it.
"""

from contextlib import suppress
from dataclasses import replace
from functools import partial

from checkpoint_store import Manifest
from mint_core.errors import CheckpointNotFound
from mint_core.rpc.quotas import Account
from mint_core.turns import Turns
from trainer_service.checkpoints import requests
from trainer_service.checkpoints.checkpoints import Checkpoints
from trainer_service.checkpoints.downloads import stored
from trainer_service.wire.idempotency import Once
from trainer_service.wire.pages import Page, page_of, place
from trainer_service.wire.requests import Identity


class Archive:
    """All methods belong to one event loop. Another tenant's checkpoint is not found."""

    def __init__(self, checkpoints: Checkpoints, ids: Account) -> None:
        self._store = checkpoints.store
        self._handoff = checkpoints.handoff
        self._sweeper = checkpoints.sweeper
        self._once = Once(ids)  # what it keeps are paths
        self._updating = Turns(1)  # what one reads, no other may change before it writes

    async def list(self, tenant: str, request: requests.ListCheckpoints) -> Page[Manifest]:
        """The newest revision of each name, newest first."""
        return await self._store.in_turn(tenant, self._list, tenant, request)

    def _list(self, tenant: str, request: requests.ListCheckpoints) -> Page[Manifest]:
        found = self._store.list(
            tenant=tenant, training_run_id=request.training_run_id or None, kind=request.kind
        )
        wanted = request.metadata_filter.items()
        chosen = [manifest for manifest in found if wanted <= manifest.metadata.items()]
        return page_of(chosen, lambda m: place(m.create_time, str(m.path)), request.page)

    async def get(self, tenant: str, path: str, *, used: bool = False) -> Manifest:
        """A revision's description; `used`: which is kept for another while by that."""
        return await self._store.in_turn(tenant, self._get, tenant, path, used)

    def _get(self, tenant: str, path: str, used: bool) -> Manifest:
        try:
            found = self._store.find_stored(path, tenant=tenant)
        except CheckpointNotFound:  # a snapshot may be in memory alone
            found = self._store.find(path, tenant=tenant)
        if used:
            found.note_use()
        return found.manifest

    async def update(self, tenant: str, request: requests.UpdateCheckpoint) -> Manifest:
        path = await self._once.run(tenant, request.identity, lambda: self._update(tenant, request))
        return await self.get(tenant, path)

    async def _update(self, tenant: str, request: requests.UpdateCheckpoint) -> str:
        def change(manifest: Manifest) -> Manifest:
            if request.changes_lifetime:
                manifest = replace(manifest, expire_time=request.expire_time)
            if request.metadata is not None:
                manifest = replace(manifest, metadata=request.metadata)
            return manifest

        async with self._updating.turn(tenant):
            changed = await self._store.in_turn(
                tenant, self._store.update, request.path, tenant=tenant, change=change
            )
        self._sweeper.note_expiry(changed.expire_time)
        return str(changed.revision_path)

    async def copy(self, tenant: str, request: requests.CopyCheckpoint) -> Manifest:
        path = await self._once.run(tenant, request.identity, lambda: self._copy(tenant, request))
        return await self.get(tenant, path)

    async def _copy(self, tenant: str, request: requests.CopyCheckpoint) -> str:
        with suppress(CheckpointNotFound):  # of what was copied already, the source may be gone
            await stored(self._store, tenant, request.path)
        copied = await self._store.in_turn(
            tenant,
            self._store.copy,
            request.path,
            request.name,
            tenant=tenant,
            expire_time=request.expire_time,
            request=request.identity.digest(tenant),
        )
        self._sweeper.note_expiry(request.expire_time)
        return str(copied.revision_path)

    async def delete(self, tenant: str, path: str, identity: Identity) -> None:
        digest = identity.digest(tenant)
        delete = partial(self._handoff.delete, path, tenant=tenant, request=digest)
        await self._once.run(tenant, identity, delete, frees=True)

"""The store's folders for what is being made, for those who must not block."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint_store import CheckpointStore, Manifest
from trainer_service.jobs import SaveCheckpoint, StoreRow

Write = Callable[[object], Awaitable[Any]]  # has the engine do a job that writes a row


@asynccontextmanager
async def staging(store: CheckpointStore, tenant: str, size_bytes: int = 0) -> AsyncIterator[Path]:
    """As `CheckpointStore.staging`; threads make the folder and remove it."""
    folder, run = store.staging(tenant, size_bytes), partial(store.in_turn, tenant)
    try:
        yield await run(folder.__enter__)
    except BaseException as error:  # also of a caller who has left while it was made
        await run(folder.__exit__, type(error), error, error.__traceback__)
        raise
    else:
        await run(folder.__exit__, None, None, None)


async def publish(
    store: CheckpointStore,
    manifest: Manifest,
    job: Callable[..., SaveCheckpoint | StoreRow],  # made of the `folder` to write to
    do: Write,
    *,
    overwrite: bool = True,
) -> Manifest:
    """Publishes what a job of the engine's writes to a folder."""
    async with staging(store, manifest.tenant) as folder:
        manifest = replace(manifest, files=await do(job(folder=str(folder))))
        return await store.in_turn(
            manifest.tenant, store.publish_folder, manifest, folder, overwrite=overwrite
        )

"""The store's folders for what is being made, for those who must not block."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_store import CheckpointStore, Manifest
from trainer_service.jobs import SaveCheckpoint, StoreRow

Write = Callable[[object], Awaitable[Any]]  # has the engine do a job that writes a row


@asynccontextmanager
async def staging(store: CheckpointStore) -> AsyncIterator[Path]:
    """As `CheckpointStore.staging`; threads make the folder and remove it."""
    folder = store.staging()
    path = await asyncio.to_thread(folder.__enter__)
    try:
        yield path
    except BaseException as error:
        await asyncio.to_thread(folder.__exit__, type(error), error, error.__traceback__)
        raise
    else:
        await asyncio.to_thread(folder.__exit__, None, None, None)


async def publish(
    store: CheckpointStore,
    manifest: Manifest,
    job: Callable[..., SaveCheckpoint | StoreRow],  # made of the `folder` to write to
    do: Write,
    *,
    overwrite: bool = True,
) -> Manifest:
    """Publishes what a job of the engine's writes to a folder."""
    async with staging(store) as folder:
        manifest = replace(manifest, files=await do(job(folder=str(folder))))
        return await asyncio.to_thread(store.publish_folder, manifest, folder, overwrite=overwrite)

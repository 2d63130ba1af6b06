"""The store's folders for what is being made, for those who must not block."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from checkpoint_store import CheckpointStore, FileEntry, Manifest


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
    write: Callable[[str], Awaitable[Mapping[str, FileEntry]]],
    *,
    overwrite: bool = True,
) -> Manifest:
    """Publishes what is written to a folder, which is handed to `write`."""
    async with staging(store) as folder:
        manifest = replace(manifest, files=await write(str(folder)))
        return await asyncio.to_thread(store.publish_folder, manifest, folder, overwrite=overwrite)

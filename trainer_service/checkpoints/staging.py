"""The store's folders for what is being made, for those who must not block."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from checkpoint_store import CheckpointStore


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

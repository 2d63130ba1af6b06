"""Adapters on their way to samplers: by memory to those of this host, by the store to all.

A named checkpoint is in the store before it is acknowledged. An unnamed snapshot is acknowledged
when samplers of this host can open it; the store gets it behind that, in the order in which
snapshots were made.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoint_store import (
    CheckpointPath,
    CheckpointStore,
    Manifest,
    SnapshotMemory,
    parse_path,
)
from checkpoint_store.errors import ObjectStoreFailed
from mint_core.errors import CheckpointNotFound, MintError
from trainer_service.checkpoints.staging import publish
from trainer_service.errors import RowNotWritten
from trainer_service.jobs import SaveCheckpoint, StoreRow, WriteRow
from trainer_service.run.description import RunOrigin

logger = logging.getLogger(__name__)

Write = Callable[[object], Awaitable[Any]]  # has the engine do a job that writes a row


class Handoff:
    """All methods belong to one event loop."""

    def __init__(
        self, store: CheckpointStore, memory: SnapshotMemory | None, store_row: Write
    ) -> None:
        """`store_row` has an engine do a `StoreRow`."""
        self._store = store
        self._store_row = store_row
        self._memory = memory
        # Snapshots that the store does not have, in order: those to be written, and those that
        # could not be, which are tried again when another could.
        self._waiting = deque(memory.unstored() if memory else ())
        self._failed: list[CheckpointPath] = []
        self._current: CheckpointPath | None = None  # which is being written
        self._writing = asyncio.Lock()  # held while the store is written to in the background
        self._writer: asyncio.Task[None] | None = None
        self._stopping = False
        self.troubles: dict[str, str] = {}  # what is wrong with a run's snapshots
        self.followers: set[asyncio.Event] = set()  # set when that changes, by those who follow it

    @property
    def unstored(self) -> int:
        """Snapshots that are in memory alone."""
        return len(self._waiting) + len(self._failed) + (self._current is not None)

    def start(self) -> None:
        """Stores what another trainer has left behind."""
        self._wake()

    async def publish(self, manifest: Manifest, row_bytes: int, write: Write) -> Manifest:
        """Publishes a run's weights; those of the same named call once. `write` has the engine
        write the run's row.
        """
        if self._memory is not None:
            draft = await asyncio.to_thread(self._memory.draft, row_bytes)
            if draft is not None:
                way = self._beside_memory if manifest.named else self._through_memory
                try:
                    return await way(self._memory, draft, manifest, write)
                except RowNotWritten as error:  # others than us have filled the memory
                    logger.warning("%s", error.message)
                finally:
                    self._memory.discard(draft)
        return await publish(
            self._store,
            manifest,
            lambda folder: write(
                SaveCheckpoint(manifest=manifest, folder=folder, with_optimizer=False)
            ),
        )

    async def delete_run(self, origin: RunOrigin, *, named: bool) -> None:
        """Deletes a run's unnamed snapshots, and its named checkpoints if asked."""
        run = origin.training_run_id
        async with self._writing:
            self._waiting = deque(r for r in self._waiting if r.training_run_id != run)
            self._failed = [r for r in self._failed if r.training_run_id != run]
            if self._memory is not None:
                await asyncio.to_thread(self._memory.remove_run, run)
            await asyncio.to_thread(self._store.delete_run, run, tenant=origin.tenant, named=named)

    async def delete(self, path: str, *, tenant: str, request: str) -> None:
        """Deletes a revision, or a name with all its revisions, in memory too."""
        asked = parse_path(path)
        async with self._writing:
            await asyncio.to_thread(self._delete, asked, tenant, request)
            self._waiting = deque(r for r in self._waiting if not asked.covers(r))
            self._failed = [r for r in self._failed if not asked.covers(r)]

    def _delete(self, asked: CheckpointPath, tenant: str, request: str) -> None:
        held = self._memory.held(asked, tenant=tenant) if self._memory else []
        try:
            self._store.delete(str(asked), tenant=tenant, request=request)
        except CheckpointNotFound:
            if not held:
                raise
        for revision in held:
            assert self._memory is not None
            self._memory.remove(revision)
            self._store.recant(revision)

    async def stop(self) -> None:
        """Stores what is not stored yet, as far as that works, and leaves the memory."""
        self._stopping = True
        self._waiting.extendleft(reversed(self._failed))
        self._failed = []
        self._wake()
        if self._writer is not None:
            await self._writer
        for revision in [*self._failed, *self._waiting]:
            logger.error("snapshot %s is in memory alone; the next trainer may store it", revision)
        if self._memory is not None:
            await asyncio.to_thread(self._memory.close)

    async def _through_memory(
        self, memory: SnapshotMemory, draft: Path, manifest: Manifest, write: Write
    ) -> Manifest:
        announced = asyncio.create_task(asyncio.to_thread(self._announce, manifest))
        try:
            await write(WriteRow(str(draft), manifest))
            try:
                await asyncio.to_thread(memory.place, draft, manifest, stored=False)
            except OSError as error:
                raise RowNotWritten(str(manifest.path), draft.parent, error) from error
        except BaseException:
            await announced
            await asyncio.to_thread(self._store.recant, manifest.path)
            raise
        await announced
        self._release_later(memory, manifest)
        self._waiting.append(manifest.revision_path)
        self._wake()
        return manifest

    async def _beside_memory(
        self, memory: SnapshotMemory, draft: Path, manifest: Manifest, write: Write
    ) -> Manifest:
        await write(WriteRow(str(draft), manifest))
        published = await self._publish(manifest, draft)
        try:
            await asyncio.to_thread(memory.place, draft, published, stored=True)
        except OSError:
            logger.exception("%s is stored and not in memory", published.revision_path)
        else:
            self._release_later(memory, published)
        return published

    async def _publish(self, manifest: Manifest, file: Path) -> Manifest:
        return await publish(
            self._store,
            manifest,
            lambda folder: self._store_row(StoreRow(str(file), manifest, folder)),
        )

    def _announce(self, manifest: Manifest) -> None:
        try:
            self._store.announce(manifest)
        except (OSError, MintError) as error:  # which the writer will meet and report
            logger.warning("%s could not be announced: %s", manifest.revision_path, error)

    def _release_later(self, memory: SnapshotMemory, manifest: Manifest) -> None:
        if manifest.expire_time is not None:
            left_s = (manifest.expire_time - datetime.now(UTC)).total_seconds()
            asyncio.get_running_loop().call_later(left_s, memory.release, manifest.revision_path)

    def _wake(self) -> None:
        if self._waiting and (self._writer is None or self._writer.done()):
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        """Stores what waits, one after the other."""
        assert self._memory is not None
        while self._waiting:
            async with self._writing:
                if not self._waiting:
                    return  # a run was deleted meanwhile
                revision = self._current = self._waiting.popleft()
                try:
                    await self._store_snapshot(self._memory, revision)
                except Exception as error:
                    self._note_failure(revision, error)
                    if self._stopping and isinstance(error, ObjectStoreFailed):
                        return  # after long attempts, and the next would take as long
                else:
                    self._note_success(revision)
                finally:
                    self._current = None

    async def _store_snapshot(self, memory: SnapshotMemory, revision: CheckpointPath) -> None:
        row = await asyncio.to_thread(memory.open, revision)
        await asyncio.to_thread(memory.prepare, 4 * row.layout.size)
        if not await asyncio.to_thread(self._store.has, revision):
            await self._publish(row.manifest, row.file.path)
        await asyncio.to_thread(memory.stored, revision)

    def _note_failure(self, revision: CheckpointPath, error: Exception) -> None:
        assert self._memory is not None
        if not self._memory.has(revision):
            return  # others needed its memory
        ours = isinstance(error, MintError | OSError)
        logger.error("snapshot %s is in memory alone: %s", revision, error, exc_info=not ours)
        self._failed.append(revision)
        self._memory.give_up(revision)
        why = error.strerror if isinstance(error, OSError) else str(error)
        trouble = f"snapshot `{revision}` is in memory alone, since it cannot be stored: {why}"
        self._tell(revision.training_run_id, trouble)

    def _note_success(self, revision: CheckpointPath) -> None:
        if all(other.training_run_id != revision.training_run_id for other in self._failed):
            self._tell(revision.training_run_id, "")
        self._waiting.extendleft(reversed(self._failed))
        self._failed = []

    def _tell(self, training_run_id: str, trouble: str) -> None:
        if trouble == self.troubles.get(training_run_id, ""):
            return
        self.troubles[training_run_id] = trouble
        if not trouble:
            del self.troubles[training_run_id]
        for follower in self.followers:
            follower.set()

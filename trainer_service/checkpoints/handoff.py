"""Adapters on their way to samplers: by memory to those of this host, by the store to all.

A named checkpoint is in the store before it is acknowledged. An unnamed snapshot is acknowledged
when samplers of this host can open it; the store gets it behind that, in the order in which
snapshots were made.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from checkpoint_store import (
    CheckpointPath,
    CheckpointStore,
    Manifest,
    SnapshotMemory,
    parse_path,
)
from checkpoint_store.errors import ObjectStoreFailed
from mint_core.errors import CheckpointNotFound, MintError
from mint_core.turns import Turns
from trainer_service.checkpoints.staging import Write, publish
from trainer_service.errors import RowNotWritten
from trainer_service.jobs import SaveCheckpoint, StoreRow, WriteRow
from trainer_service.run_description import RunOrigin

logger = logging.getLogger(__name__)


class Handoff:
    """All methods belong to one event loop."""

    def __init__(
        self, store: CheckpointStore, memory: SnapshotMemory | None, store_row: Write
    ) -> None:
        """`store_row` has an engine do a `StoreRow`."""
        self._store = store
        self._store_row = store_row
        self._memory = memory
        # Snapshots that the store does not have, in order, and whether they could not be written:
        # such are tried again when another could.
        self._unstored = dict.fromkeys(memory.unstored() if memory else (), False)
        self._writing = Turns(1)  # taken while the store is written to in the background
        self._writer: asyncio.Task[None] | None = None
        self._stopping = False
        self.troubles: dict[str, str] = {}  # what is wrong with a run's snapshots
        self.followers: set[Callable[[], None]] = set()  # called when that changes

    @property
    def unstored(self) -> int:
        """Snapshots that are in memory alone."""
        return len(self._unstored)

    def start(self) -> None:
        """Begins to store what is not stored yet, such as what another trainer has left behind."""
        if self._next() and (self._writer is None or self._writer.done()):
            self._writer = asyncio.create_task(self._write())

    async def publish(self, manifest: Manifest, row_bytes: int, write: Write) -> Manifest:
        """Publishes a run's weights; those of the same named call once. `write` has the engine
        write the run's row.
        """
        if self._memory is not None:
            draft = await self._store.in_turn(manifest.tenant, self._memory.draft, row_bytes)
            if draft is not None:
                way = self._beside_memory if manifest.named else self._through_memory
                try:
                    return await way(self._memory, draft, manifest, write)
                except RowNotWritten as error:  # others than us have filled the memory
                    logger.warning("%s", error.message)
                finally:
                    self._memory.discard(draft)
        job = partial(SaveCheckpoint, manifest=manifest, with_optimizer=False)
        return await publish(self._store, manifest, job, write)

    async def delete_run(self, origin: RunOrigin, *, named: bool) -> None:
        """Deletes a run's unnamed snapshots, and its named checkpoints if asked."""
        run = origin.training_run_id
        async with self._writing.turn(origin.tenant):
            for revision in [r for r in self._unstored if r.training_run_id == run]:
                del self._unstored[revision]
            if self._memory is not None:
                await self._store.in_turn(origin.tenant, self._memory.remove_run, run)
            await self._store.in_turn(
                origin.tenant, self._store.delete_run, run, tenant=origin.tenant, named=named
            )

    async def delete(self, path: str, *, tenant: str, request: str) -> None:
        """Deletes a revision, or a name with all its revisions, in memory too."""
        asked = parse_path(path)
        async with self._writing.turn(tenant):
            await self._store.in_turn(tenant, self._delete, asked, tenant, request)
            for revision in [r for r in self._unstored if asked.covers(r)]:
                del self._unstored[revision]

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
        self._unstored = dict.fromkeys(self._unstored, False)
        self.start()
        if self._writer is not None:
            await self._writer
        for revision in self._unstored:
            logger.error("snapshot %s is in memory alone; the next trainer may store it", revision)
        if self._memory is not None:
            await asyncio.to_thread(self._memory.close)

    async def _through_memory(
        self, memory: SnapshotMemory, draft: Path, manifest: Manifest, write: Write
    ) -> Manifest:
        run = partial(self._store.in_turn, manifest.tenant)
        announced = asyncio.create_task(run(self._announce, manifest))
        try:
            await write(WriteRow(str(draft), manifest))
            try:
                await run(memory.place, draft, manifest, stored=False)
            except OSError as error:
                raise RowNotWritten(str(manifest.path), draft.parent, error) from error
        except BaseException:
            await announced
            await run(self._store.recant, manifest.path)
            raise
        await announced
        self._release_later(memory, manifest)
        self._unstored[manifest.revision_path] = False
        self.start()
        return manifest

    async def _beside_memory(
        self, memory: SnapshotMemory, draft: Path, manifest: Manifest, write: Write
    ) -> Manifest:
        await write(WriteRow(str(draft), manifest))
        published = await self._publish(manifest, draft)
        try:
            await self._store.in_turn(manifest.tenant, memory.place, draft, published, stored=True)
        except OSError:
            logger.exception("%s is stored and not in memory", published.revision_path)
        else:
            self._release_later(memory, published)
        return published

    async def _publish(self, manifest: Manifest, file: Path) -> Manifest:
        job = partial(StoreRow, str(file), manifest)
        return await publish(self._store, manifest, job, self._store_row)

    def _announce(self, manifest: Manifest) -> None:
        try:
            self._store.announce(manifest)
        except (OSError, MintError) as error:  # which the writer will meet and report
            logger.warning("%s could not be announced: %s", manifest.revision_path, error)

    def _release_later(self, memory: SnapshotMemory, manifest: Manifest) -> None:
        if manifest.expire_time is not None:
            left_s = (manifest.expire_time - datetime.now(UTC)).total_seconds()
            asyncio.get_running_loop().call_later(left_s, memory.release, manifest.revision_path)

    def _next(self) -> CheckpointPath | None:
        return next((r for r, failed in self._unstored.items() if not failed), None)

    async def _write(self) -> None:
        """Stores what waits, one after the other."""
        assert self._memory is not None
        while self._next():
            async with self._writing.turn(""):  # the server's own
                revision = self._next()
                if revision is None:
                    return  # a run was deleted meanwhile
                try:
                    await self._store_snapshot(self._memory, revision)
                except Exception as error:
                    self._note_failure(revision, error)
                    if self._stopping and isinstance(error, ObjectStoreFailed):
                        return  # after long attempts, and the next would take as long
                else:
                    self._note_success(revision)

    async def _store_snapshot(self, memory: SnapshotMemory, revision: CheckpointPath) -> None:
        row = await asyncio.to_thread(memory.open, revision)  # whose it is, the row says
        run = partial(self._store.in_turn, row.manifest.tenant)
        await run(memory.prepare, 4 * row.layout.size)
        if not await run(self._store.has, revision):
            await self._publish(row.manifest, row.file.path)
        await run(memory.stored, revision)

    def _note_failure(self, revision: CheckpointPath, error: Exception) -> None:
        assert self._memory is not None
        if not self._memory.has(revision):
            del self._unstored[revision]  # others needed its memory
            return
        ours = isinstance(error, MintError | OSError)
        logger.error("snapshot %s is in memory alone: %s", revision, error, exc_info=not ours)
        self._unstored[revision] = True
        self._memory.give_up(revision)
        why = error.strerror if isinstance(error, OSError) else str(error)
        trouble = f"snapshot `{revision}` is in memory alone, since it cannot be stored: {why}"
        self._tell(revision.training_run_id, trouble)

    def _note_success(self, revision: CheckpointPath) -> None:
        del self._unstored[revision]
        run = revision.training_run_id
        if not any(failed and r.training_run_id == run for r, failed in self._unstored.items()):
            self._tell(run, "")
        self._unstored = dict.fromkeys(self._unstored, False)

    def _tell(self, training_run_id: str, trouble: str) -> None:
        if trouble == self.troubles.get(training_run_id, ""):
            return
        self.troubles[training_run_id] = trouble
        if not trouble:
            del self.troubles[training_run_id]
        for follower in self.followers:
            follower()

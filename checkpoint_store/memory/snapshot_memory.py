"""A trainer's snapshots in memory: where samplers of the same host find them at once."""

import errno
import logging
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.manifest import Manifest
from checkpoint_store.memory.published_row import (
    OWNER_PREFIX,
    PublishedRow,
    is_private,
    open_row,
    place_of,
)
from checkpoint_store.paths import SAMPLER_WEIGHTS, CheckpointPath
from mint_core.errors import FailedPrecondition
from mint_core.owned_folder import OwnedFolder

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.1  # of what is free, where no limit is given
_HEADER_BYTES = 64 * 1024  # of a row file, beside its numbers: about what it takes


@dataclass(slots=True)
class _Held:
    """A row in memory."""

    size_bytes: int
    stored: bool  # whether the store has it too
    kept: bool = True  # whether it stays when the store has it
    given_up: bool = False  # whether it could not be stored


class SnapshotMemory:
    """Row files up to a limit. To make room the oldest go that the store has too, then those that
    could not be stored. Calls block briefly; safe from any thread.
    """

    def __init__(self, folder: Path, limit_bytes: int = 0) -> None:
        """With `limit_bytes` 0, the limit is a share of free memory."""
        self._held: dict[CheckpointPath, _Held] = {}  # the oldest first
        self._drafts: dict[Path, int] = {}  # with their sizes
        self._spare: Path | None = None  # a draft whose memory is taken
        self._lock = threading.Lock()
        try:
            self._owned = self._own(folder)
            self.limit_bytes = limit_bytes or _affordable_bytes(folder)
        except OSError as error:
            raise FailedPrecondition(
                f"`snapshot_memory_folder` {folder} cannot be used: {error.strerror}; remove "
                "it, or choose another for trainer and sampler"
            ) from error

    @property
    def size_bytes(self) -> int:
        """Of all that is here."""
        return sum(held.size_bytes for held in self._held.values()) + sum(self._drafts.values())

    def unstored(self) -> list[CheckpointPath]:
        """Rows that a trainer that is gone has left behind and not stored."""
        return [revision for revision, held in self._held.items() if not held.stored]

    def draft(self, numbers_bytes: int) -> Path | None:
        """A file to write a row to; None if there is no room now."""
        with self._lock:
            draft, self._spare = self._spare, None
            if draft and draft.exists() and self._drafts[draft] == numbers_bytes + _HEADER_BYTES:
                return draft
        if draft is not None:
            self.discard(draft)
        return self._new_draft(numbers_bytes)

    def prepare(self, numbers_bytes: int) -> None:
        """Takes the memory of the next draft now, if it is of this size: that is a fifth of the
        time that writing to a new one takes.
        """
        if self._spare is not None:
            return
        draft = self._new_draft(numbers_bytes)
        if draft is None:
            return
        try:
            with draft.open("wb") as opened:
                os.posix_fallocate(opened.fileno(), 0, self._drafts[draft])
        except OSError:  # others than us have filled the memory
            self.discard(draft)
        else:
            self._spare = draft

    def discard(self, draft: Path) -> None:
        """Removes a draft, unless it was placed."""
        with self._lock:
            self._drafts.pop(draft, None)
        draft.unlink(missing_ok=True)

    def place(self, draft: Path, manifest: Manifest, *, stored: bool) -> None:
        """Shows a row, which was written to a draft, to samplers."""
        file = self._owned.path / place_of(manifest.revision_path)
        with self._lock:
            file.parent.mkdir(exist_ok=True)
            draft.rename(file)
            del self._drafts[draft]
            self._held[manifest.revision_path] = _Held(file.stat().st_size, stored)

    def open(self, revision: CheckpointPath) -> PublishedRow:
        """A row that is here."""
        return open_row(self._owned.path / place_of(revision), str(revision))

    def has(self, revision: CheckpointPath) -> bool:
        return revision in self._held

    def stored(self, revision: CheckpointPath) -> None:
        """Notes that the store has a row too."""
        with self._lock:
            held = self._held.get(revision)
            if held is not None:
                held.stored = True
                if not held.kept:
                    self._remove(revision)

    def give_up(self, revision: CheckpointPath) -> None:
        """Notes that a row could not be stored: it stays while there is room."""
        with self._lock:
            if revision in self._held:
                self._held[revision].given_up = True

    def release(self, revision: CheckpointPath) -> None:
        """Removes a row, if it is here, as soon as the store has it."""
        with self._lock:
            held = self._held.get(revision)
            if held is not None and held.stored:
                self._remove(revision)
            elif held is not None:
                held.kept = False

    def held(self, asked: CheckpointPath, *, tenant: str) -> list[CheckpointPath]:
        """The tenant's revisions of a path that are here."""
        with self._lock:
            found = [revision for revision in self._held if asked.covers(revision)]
        return [revision for revision in found if self.open(revision).manifest.tenant == tenant]

    def remove(self, revision: CheckpointPath) -> None:
        """Removes a row, stored or not."""
        with self._lock:
            if revision in self._held:
                self._remove(revision)

    def remove_run(self, training_run_id: str) -> None:
        """Removes a run's rows, stored or not."""
        with self._lock:
            for revision in [r for r in self._held if r.training_run_id == training_run_id]:
                self._remove(revision)

    def close(self) -> None:
        """Removes everything; what the store lacks is left to the next trainer."""
        with self._lock:
            for draft in self._drafts:
                draft.unlink(missing_ok=True)
            for revision in [r for r, held in self._held.items() if held.stored]:
                self._remove(revision)
            if self._held:
                self._owned.release()
                return
        self._owned.remove()
        with suppress(OSError):  # another trainer has its part there
            self._owned.path.parent.rmdir()

    def _own(self, folder: Path) -> OwnedFolder:
        while True:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_private(folder):
                raise PermissionError(errno.EPERM, "others than this user can enter it")
            with suppress(FileNotFoundError):  # the last who was there has just removed it
                return OwnedFolder(folder, OWNER_PREFIX, rescue=self._rescue)

    def _new_draft(self, numbers_bytes: int) -> Path | None:
        size_bytes = numbers_bytes + _HEADER_BYTES
        with self._lock:
            victims = []
            room_bytes = self.limit_bytes - self.size_bytes
            for revision in self._dispensable():
                if room_bytes >= size_bytes:
                    break
                victims.append(revision)
                room_bytes += self._held[revision].size_bytes
            if room_bytes < size_bytes:
                return None
            for revision in victims:
                self._remove(revision)
            draft = self._owned.path / f"draft-{uuid4().hex}"
            self._drafts[draft] = size_bytes
        return draft

    def _dispensable(self) -> list[CheckpointPath]:
        """What may go, in that order."""
        stored = [revision for revision, held in self._held.items() if held.stored]
        given_up = (r for r, held in self._held.items() if held.given_up and not held.stored)
        return [*stored, *given_up]

    def _remove(self, revision: CheckpointPath) -> None:
        held = self._held.pop(revision)
        if held.given_up and not held.stored:
            logger.error("snapshot %s is lost: others needed its memory", revision)
        file = self._owned.path / place_of(revision)
        with suppress(OSError):  # others of the run are there, or somebody has cleared the memory
            file.unlink()
            file.parent.rmdir()

    def _rescue(self, abandoned: Path, ours: Path) -> None:
        """Takes over what a trainer that is gone may not have stored: unnamed snapshots."""
        for left in abandoned.glob("*/*@*"):
            try:
                row = open_row(left, f"mint://{left.parent.name}/{SAMPLER_WEIGHTS}/{left.name}")
            except CheckpointDamaged as error:
                logger.warning("%s", error)
                continue
            if not row.manifest.named:
                revision = row.manifest.revision_path
                file = ours / place_of(revision)
                file.parent.mkdir(exist_ok=True)
                left.rename(file)
                self._held[revision] = _Held(row.file.size_bytes, stored=False, kept=False)


def _affordable_bytes(folder: Path) -> int:
    free_bytes = min(shutil.disk_usage(folder).free, psutil.virtual_memory().available)
    return int(MEMORY_SHARE * free_bytes)

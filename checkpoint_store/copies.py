"""Files of checkpoints that lie elsewhere, on this host while there is room."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from checkpoint_store.adapter_files import verify_file
from checkpoint_store.errors import FULL, CheckpointDamaged
from checkpoint_store.manifest import FileEntry, Manifest
from checkpoint_store.objects.object_path import ObjectPath
from mint_core.errors import ResourceExhausted

logger = logging.getLogger(__name__)

DISK_SHARE = 0.2  # of what is free
KEPT_S = 3600.0  # at least, after it was asked for: who asked is still reading


class Source(Protocol):
    """Where the files of a checkpoint come from."""

    def fetch(self, path: str, file: Path, entry: FileEntry) -> None:
        """Puts a file, by its name, in its place once it is whole, and what was published. Raises
        CheckpointDamaged.
        """


class ObjectFolder:
    """Of an object store."""

    def __init__(self, files: ObjectPath) -> None:
        self._files = files

    def fetch(self, path: str, file: Path, entry: FileEntry) -> None:
        source, draft = self._files / file.name, file.with_name(f".{file.name}.{uuid4().hex}")
        try:
            source.objects.download(source.key, draft)
            draft.rename(file)
        except FileNotFoundError:
            raise CheckpointDamaged(path, file.name, "is missing") from None
        finally:
            draft.unlink(missing_ok=True)
        verify_file(path, file, entry)


class Copies:
    """Blocking calls, safe from any thread and from several processes that share the folder."""

    def __init__(self, folder: Path, limit_bytes: int = 0) -> None:
        """With `limit_bytes` 0, the limit is a share of the free space."""
        self._folder = folder
        self._limit_bytes = limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def folder(self, manifest: Manifest) -> Path:
        """Where the files of a revision are, or would be."""
        revision = f"{manifest.revision}.{manifest.files_folder}"
        return self._folder / manifest.training_run_id / manifest.kind / manifest.name / revision

    def bring(self, manifest: Manifest, source: "Source") -> None:
        """Makes copies of what is not here, or here and damaged. Raises CheckpointDamaged if the
        source has other files than were published, and ResourceExhausted.
        """
        path, folder = str(manifest.revision_path), self.folder(manifest)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        for name, entry in manifest.files.items():
            file = folder / name
            try:
                verify_file(path, file, entry)
            except CheckpointDamaged as problem:
                if file.exists():
                    logger.warning("copy: %s", problem)
                self._fetch(path, file, entry, source)
        self._make_room()

    def _fetch(self, path: str, file: Path, entry: FileEntry, source: "Source") -> None:
        started_s = time.perf_counter()
        try:
            source.fetch(path, file, entry)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ResourceExhausted(
                f"file `{file.name}` of checkpoint `{path}` cannot be copied to `local_folder`: "
                f"{error.strerror}; free disk space, or choose another folder"
            ) from error
        took_s = time.perf_counter() - started_s
        logger.info("copied path=%s file=%s s=%.3f", path, file.name, took_s)

    def _make_room(self) -> None:
        """Removes the copies that were asked for least recently."""
        held = sorted(filter(None, map(_held, self._folder.glob("*/*/*/*"))))
        total = sum(size_bytes for _, size_bytes, _ in held)
        free_bytes = shutil.disk_usage(self._folder).free
        limit_bytes = self._limit_bytes or DISK_SHARE * (free_bytes + total)
        for used_s, size_bytes, folder in held:
            if total <= limit_bytes or used_s > time.time() - KEPT_S:
                break
            shutil.rmtree(folder, ignore_errors=True)
            total -= size_bytes


def _held(folder: Path) -> tuple[float, int, Path] | None:
    """When a folder of copies was asked for, and its size; None if it is gone."""
    try:
        used_s = folder.stat().st_mtime
        return used_s, sum(file.stat().st_size for file in folder.iterdir()), folder
    except FileNotFoundError:
        return None

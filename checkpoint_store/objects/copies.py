"""Files of an object store's checkpoints, on this host while there is room."""

import logging
import os
import shutil
import time
from pathlib import Path
from uuid import uuid4

from checkpoint_store.adapter_files import verify_file
from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.manifest import Manifest
from checkpoint_store.objects.object_path import ObjectPath

logger = logging.getLogger(__name__)

DISK_SHARE = 0.2  # of what is free
KEPT_S = 3600.0  # at least, after it was asked for: who asked is still reading


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

    def bring(self, manifest: Manifest, files: ObjectPath) -> None:
        """Makes copies of what is not here, or here and damaged. Raises CheckpointDamaged if the
        store has other files than were published.
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
                self._fetch(path, files / name, file)
                verify_file(path, file, entry)
        self._make_room()

    def _fetch(self, path: str, source: ObjectPath, file: Path) -> None:
        draft = file.with_name(f".{file.name}.{uuid4().hex}")
        started_s = time.perf_counter()
        try:
            source.objects.download(source.key, draft)
            draft.rename(file)
        except FileNotFoundError:
            raise CheckpointDamaged(path, file.name, "is missing") from None
        finally:
            draft.unlink(missing_ok=True)
        logger.info("copied file=%s s=%.3f", source, time.perf_counter() - started_s)

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

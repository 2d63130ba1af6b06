"""The folder of this sampler's own row files, for adapters that came from the store in another
form.
"""

import errno
import hashlib
import itertools
import logging
import shutil
import threading
from pathlib import Path

from checkpoint_store import Manifest, write_published_row
from mint_core.errors import ResourceExhausted
from mint_core.lora.row_layout import Floats, RowLayout
from mint_core.owned_folder import SAMPLER_ROWS, owned_row_folder

logger = logging.getLogger(__name__)

DISK_SHARE = 0.2  # of what is free, where no limit is given


class RowFolder:
    """Files up to a limit; those asked for least recently go first. The system keeps in memory what
    is in use. The folder ends with the process. Safe from any thread.
    """

    def __init__(self, parent: Path, limit_bytes: int = 0) -> None:
        """With `limit_bytes` 0, the limit is a share of the free space."""
        self._owned = owned_row_folder(parent, SAMPLER_ROWS)
        self._limit_bytes = limit_bytes or int(DISK_SHARE * shutil.disk_usage(parent).free)
        self._sizes: dict[str, int] = {}  # by revision path, the least recently used first
        self._lock = threading.RLock()
        self._numbers = itertools.count()  # of drafts

    def get(self, revision_path: str) -> Path | None:
        """The file of a revision, if it is here."""
        with self._lock:
            if revision_path not in self._sizes:
                return None
            self._sizes[revision_path] = self._sizes.pop(revision_path)
        return self._file(revision_path)

    def put(self, manifest: Manifest, layout: RowLayout, row: Floats) -> Path:
        """Makes the file of a revision. Raises ResourceExhausted."""
        revision_path = str(manifest.revision_path)
        file = self._file(revision_path)
        draft = file.with_suffix(f".{next(self._numbers)}")  # nobody else makes the same one
        while True:
            try:
                size_bytes = write_published_row(draft, row, layout, manifest)
                break
            except OSError as error:
                draft.unlink(missing_ok=True)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._drop_oldest():
                    raise ResourceExhausted(
                        f"adapter `{revision_path}` cannot be written to `row_folder`: "
                        f"{error.strerror}; free disk space, or choose another folder"
                    ) from error
        draft.rename(file)
        with self._lock:
            self._sizes[revision_path] = size_bytes
            while sum(self._sizes.values()) > self._limit_bytes and len(self._sizes) > 1:
                self._drop_oldest()
        return file

    def drop(self, revision_path: str) -> None:
        """Removes a file, if it is here. Who has mapped it keeps it."""
        with self._lock:
            if self._sizes.pop(revision_path, None) is not None:
                self._file(revision_path).unlink(missing_ok=True)

    def close(self) -> None:
        self._owned.remove()

    def _drop_oldest(self) -> bool:
        """Whether there was one to remove."""
        with self._lock:
            oldest = next(iter(self._sizes), "")
            self.drop(oldest)
            return bool(oldest)

    def _file(self, revision_path: str) -> Path:
        name = hashlib.sha256(revision_path.encode()).hexdigest()[:32]
        return self._owned.path / f"{name}.row"

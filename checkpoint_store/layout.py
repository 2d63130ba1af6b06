"""Where things lie, `<root>/<training_run_id>/<kind>/<name>/<revision>/`, and how they come there:
written beside, shown by one rename.

What is being written lies in `.staging/`, in the root or, beside an object store, in a local
folder.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from checkpoint_store import retention, revisions
from checkpoint_store.adapter_files import flush_files
from checkpoint_store.errors import CheckpointDamaged, full_disk_told
from checkpoint_store.index import Index
from checkpoint_store.manifest import MANIFEST_FILE, Maker, Manifest, encode_manifest
from checkpoint_store.objects import object_revisions
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.objects.places import Place, folder_of, folders_in, remove, remove_tree
from checkpoint_store.paths import KINDS, CheckpointPath
from mint_core.durable_files import flush_folder, make_folder, write_durably
from mint_core.errors import AlreadyExists

logger = logging.getLogger(__name__)

_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP)


class StoreLayout:
    def __init__(self, root: Place, local: Path) -> None:
        self._root = root
        self.index = Index(root)
        self._staging = local / ".staging"  # no run id starts with a dot

    def name_folder(self, path: CheckpointPath) -> Place:
        return folder_of(self._root, path.at(None))

    def revision_folder(self, path: CheckpointPath) -> Place:
        return folder_of(self._root, path)

    def files_folder(self, manifest: Manifest) -> Place:
        """Where a revision's files lie."""
        if manifest.files_folder:
            return self.name_folder(manifest.path) / manifest.files_folder
        return self.revision_folder(manifest.revision_path)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder to write in, on the store's file system, gone afterwards. A full disk is
        ResourceExhausted.
        """
        staging = self._staging / uuid4().hex
        try:
            with full_disk_told():
                make_folder(self._staging)
                staging.mkdir()
                yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def publish(self, staging: Path, manifest: Manifest, *, overwrite: bool) -> Manifest:
        """Shows what was staged as the next revision of its name. What a request or a run's call
        publishes once more is there already: a crash may have hidden that.
        """
        path, folder = manifest.path, self.name_folder(manifest.path)
        if made := self.made_by(path, manifest.maker):
            revisions.settle(folder)
            return made
        files = manifest.files or flush_files(staging)
        local = isinstance(self._root, Path)
        files_folder = "" if local else object_revisions.files_folder(staging)
        described = replace(manifest, files=files, files_folder=files_folder)

        def prepare(revision: int) -> None:
            now = datetime.now(UTC)
            held = self.newest_first(path)
            if not overwrite and any(not retention.past_expiry(m, now) for m in held):
                raise AlreadyExists(
                    f"checkpoint `{path}` exists; choose another `name` or set `overwrite`",
                    path=path,
                )
            encoded = encode_manifest(replace(described, revision=revision))
            write_durably(staging / MANIFEST_FILE, encoded)
            flush_folder(staging)

        published = replace(described, revision=revisions.place(staging, folder, prepare))
        self.index.note(published)
        return published

    def bury(self, manifest: Manifest, request: str = "") -> None:
        """Removes a revision, in the name of a request."""
        revisions.bury(self.revision_folder(manifest.revision_path), request)
        self.index.forget(manifest.revision_path)

    def made_by(self, path: CheckpointPath, maker: Maker) -> Manifest | None:
        """The revision of a name that a request or a call has made."""
        held = self.revisions_of(path) if any(maker) else []
        return next((m for m in held if m.maker == maker), None)

    def newest_first(self, path: CheckpointPath) -> Iterator[Manifest]:
        """The revision that the path names, or all of its name. A damaged manifest raises."""
        numbers = [path.revision] if path.revision else revisions.numbers(self.name_folder(path))
        found = (self.index.find(path.at(number)) for number in reversed(numbers))
        return (manifest for manifest in found if manifest is not None)

    def revisions_of(self, path: CheckpointPath) -> list[Manifest]:
        """All revisions of a name, in order; damaged ones are only logged."""
        found: list[Manifest] = []
        for number in revisions.numbers(self.name_folder(path)):
            try:
                found += self.newest_first(path.at(number))
            except CheckpointDamaged as error:
                logger.warning("%s", error)
        return found

    def runs(self, prefix: str = "") -> list[str]:
        """Ids of the runs that have had checkpoints."""
        return [run for run in folders_in(self._root) if run.startswith(prefix)]

    def names(self, runs: Iterable[str]) -> Iterator[CheckpointPath]:
        """Every name of the runs, those without revisions too."""
        for run in runs:
            for kind in KINDS.values():
                for name in folders_in(self._root / run / kind):
                    yield CheckpointPath(run, kind, name)

    def tidy(self, path: CheckpointPath, *, since: datetime) -> None:
        """Removes what dead revisions of a name left behind, and a snapshot's folder in which
        nothing has come of what was announced. What is younger than `since` stays.
        """
        folder = self.name_folder(path)
        revisions.clear_tombstones(folder, since)
        if path.unnamed and revisions.has_ended(folder, since):
            remove_tree(folder)
        if isinstance(folder, ObjectPath):
            self._clear_files(path, folder, since)

    def clear_staging(self, *, older_than: datetime) -> None:
        for entry in self._staging.iterdir() if self._staging.is_dir() else ():
            if datetime.fromtimestamp(entry.lstat().st_mtime, UTC) < older_than:
                remove(entry)

    def _clear_files(self, path: CheckpointPath, folder: ObjectPath, since: datetime) -> None:
        live = self.revisions_of(path)
        if len(live) == len(revisions.live_revisions(folder)):  # so none is damaged
            named = {manifest.files_folder for manifest in live}
            object_revisions.remove_unnamed(folder, named, since)


def share_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Puts files of one folder into another of the same file system. They are never written to, so
    that links will do where there are links.
    """
    for name in names:
        try:
            os.link(source / name, target / name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(source / name, target / name)

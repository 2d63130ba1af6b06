"""Where things lie: `<root>/<training_run_id>/<kind>/<name>/<revision>/`.

What is being written lies in `.staging/`, in the root or, beside an object store, in a local
folder.
"""

import logging
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from checkpoint_store import revisions
from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.manifest import Manifest
from checkpoint_store.objects import object_revisions
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.paths import KINDS, CheckpointPath
from checkpoint_store.places import Place, remove_tree

logger = logging.getLogger(__name__)


class StoreLayout:
    def __init__(self, root: Place, local: Path) -> None:
        self._root = root
        self.staging = local / ".staging"  # no run id starts with a dot

    def name_folder(self, path: CheckpointPath) -> Place:
        return self._root / path.training_run_id / path.kind / path.name

    def revision_folder(self, path: CheckpointPath) -> Place:
        return self.name_folder(path) / str(path.revision)

    def files_folder(self, manifest: Manifest) -> Place:
        """Where a revision's files lie."""
        if manifest.files_folder:
            return self.name_folder(manifest.path) / manifest.files_folder
        return self.revision_folder(manifest.revision_path)

    def files_folder_of(self, staging: Path) -> str:
        """How a manifest names where the files will lie that are staged now."""
        local = isinstance(self._root, Path)
        return "" if local else object_revisions.files_folder(staging)

    def newest_first(self, path: CheckpointPath) -> Iterator[Manifest]:
        """The revision that the path names, or all of its name. A damaged manifest raises."""
        numbers = (
            [path.revision] if path.revision else revisions.live_revisions(self.name_folder(path))
        )
        for number in reversed(numbers):
            revision = path.at(number)
            manifest = revisions.read_manifest(self.revision_folder(revision), revision)
            if manifest is not None:
                yield manifest

    def revisions_of(self, path: CheckpointPath) -> list[Manifest]:
        """All revisions of a name, in order; damaged ones are only logged."""
        found: list[Manifest] = []
        for number in revisions.live_revisions(self.name_folder(path)):
            try:
                found += self.newest_first(path.at(number))
            except CheckpointDamaged as error:
                logger.warning("%s", error)
        return found

    def runs(self, prefix: str = "") -> list[str]:
        """Ids of the runs that have had checkpoints."""
        return [run for run in _entries(self._root) if run.startswith(prefix)]

    def names(self, runs: Iterable[str]) -> Iterator[CheckpointPath]:
        """Every name of the runs, those without revisions too."""
        for run in runs:
            for kind in KINDS.values():
                for name in _entries(self._root / run / kind):
                    yield CheckpointPath(run, kind, name)

    def all_revisions(self, runs: Iterable[str]) -> Iterator[Manifest]:
        for name in self.names(runs):
            yield from self.revisions_of(name)

    def tidy(self, path: CheckpointPath, *, since: datetime) -> None:
        """Removes what dead revisions of a name left behind, and a snapshot's folder in which
        nothing has come of what was announced. What is younger than `since` stays.
        """
        folder = self.name_folder(path)
        revisions.clear_tombstones(folder, since)
        if path.unnamed and (
            revisions.all_dead(folder, since) or revisions.never_came(folder, since)
        ):
            remove_tree(folder)
        if isinstance(folder, ObjectPath):
            self._clear_files(path, folder, since)

    def clear_staging(self, *, older_than: datetime) -> None:
        for entry in self.staging.iterdir() if self.staging.is_dir() else ():
            if datetime.fromtimestamp(entry.stat().st_mtime, UTC) >= older_than:
                continue
            if entry.is_dir():
                remove_tree(entry)
            else:
                entry.unlink(missing_ok=True)

    def _clear_files(self, path: CheckpointPath, folder: ObjectPath, since: datetime) -> None:
        live = self.revisions_of(path)
        if len(live) == len(revisions.live_revisions(folder)):  # so none is damaged
            named = {manifest.files_folder for manifest in live}
            object_revisions.remove_unnamed(folder, named, since)


def _entries(folder: Place) -> list[str]:
    """Names of the folders in a folder, in order; none if it does not exist."""
    try:
        return sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    except FileNotFoundError:
        return []

"""What this process knows of the store's manifests: a list reads those alone that are new to it.

A manifest is never written to: what changes it puts another file in its place, which has another
stamp. So what is known holds while the stamp does, whoever else writes to the store. Each run is
one tenant's: of another's there is nothing that need be looked at.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from checkpoint_store import revisions
from checkpoint_store.errors import CheckpointDamaged, StoreQuotaExceeded
from checkpoint_store.manifest import MANIFEST_FILE, Manifest
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.objects.places import Place, folder_of
from checkpoint_store.paths import MERGED_WEIGHTS, CheckpointPath, is_path, parse_path

logger = logging.getLogger(__name__)

Stamp = tuple[object, ...]  # of the file that a manifest is in; empty: it is not known


class Index:
    """Blocking calls, safe from any thread."""

    def __init__(self, root: Place) -> None:
        self._root = root
        self._runs: dict[str, dict[CheckpointPath, tuple[Stamp, Manifest]]] = {}
        self._tenants: dict[str, set[str]] = {}  # by run, those that have or had something there
        self._sizes: Counter[tuple[str, str]] = Counter()  # in bytes, by tenant and use
        self._lock = threading.Lock()

    def find(self, revision: CheckpointPath) -> Manifest | None:
        """The manifest of a revision as it is now, if there is one. Raises CheckpointDamaged."""
        return self._read(revision, ())

    def all_of(self, run: str) -> list[Manifest]:
        """The manifests of a run, those of each name in order; damaged ones are only logged."""
        found, stamps = [], self._stamps(run)
        for known in list(self._runs.get(run, {})):
            if known not in stamps:
                self.forget(known)
        for revision, stamp in stamps.items():
            try:
                found.append(self._read(revision, stamp))
            except CheckpointDamaged as error:
                logger.warning("%s", error)
        return [manifest for manifest in found if manifest is not None]

    def of_tenant(self, tenant: str, runs: Iterable[str]) -> Iterator[Manifest]:
        """What a tenant has in those runs."""
        for run in runs:
            if tenant in self._tenants.get(run, {tenant}):
                yield from (found for found in self.all_of(run) if found.tenant == tenant)

    def may_tell(self, tenant: str, run: str) -> bool:
        """Whether a tenant may hear of damage in a run: as far as is known it is not another's."""
        self.all_of(run)
        return tenant in self._tenants.get(run, {tenant})

    def keep(self, runs: Iterable[str]) -> None:
        """Forgets the runs that are not among these."""
        for run in (self._runs.keys() | self._tenants.keys()) - set(runs):
            for revision in list(self._runs.get(run, {})):
                self.forget(revision)
            self._tenants.pop(run, None)

    def size_bytes(self, tenant: str) -> Mapping[str, int]:
        """What a tenant's `checkpoints`, `snapshots`, `uploads` and `merged_models` take, as far as
        is known, and what is `under_way`. A link counts as a copy.
        """
        sizes = list(self._sizes.items())
        return {use: size for (whose, use), size in sizes if whose == tenant and size}

    @contextmanager
    def room(self, tenant: str, size_bytes: int, quota_bytes: int) -> Iterator[None]:
        """Counts what is about to come, if that is within a tenant's quota."""
        with self._lock:
            used = sum(self.size_bytes(tenant).values())
            if 0 < quota_bytes < used + max(1, size_bytes):
                raise StoreQuotaExceeded(used, quota_bytes, size_bytes)
            self._sizes[tenant, "under_way"] += size_bytes
        try:
            yield
        finally:
            with self._lock:
                self._sizes[tenant, "under_way"] -= size_bytes

    def note(self, manifest: Manifest) -> None:
        """Takes in what was published."""
        self._set(manifest.revision_path, ((), manifest))

    def forget(self, revision: CheckpointPath) -> None:
        """Takes in that a revision is gone."""
        self._set(revision, None)

    def _read(self, revision: CheckpointPath, stamp: Stamp) -> Manifest | None:
        known = self._runs.get(revision.training_run_id, {}).get(revision)
        if known is not None and stamp and known[0] == stamp:
            return known[1]
        found = None
        try:
            found = revisions.read_manifest(folder_of(self._root, revision), revision)
        finally:
            if found is None or known is None or stamp or found != known[1]:
                self._set(revision, None if found is None else (stamp, found))
        return found

    def _set(self, revision: CheckpointPath, known: tuple[Stamp, Manifest] | None) -> None:
        run = revision.training_run_id
        with self._lock:
            held = self._runs.setdefault(run, {})
            if before := held.pop(revision, None):
                self._sizes[_use(before[1])] -= before[1].size_bytes
            if known is not None:
                held[revision] = known
                self._sizes[_use(known[1])] += known[1].size_bytes
                self._tenants.setdefault(run, set()).add(known[1].tenant)
            if not held:
                del self._runs[run]

    def _stamps(self, run: str) -> Mapping[CheckpointPath, Stamp]:
        """Of the manifests of a run, those of each name in order."""
        place = self._root / run
        if isinstance(place, ObjectPath):  # one request for each thousand keys
            below = place.objects.below(place.key)
            files = {key.removeprefix(place.key): tuple(below[key].values()) for key in below}
        else:
            found = place.glob(f"*/*/*/{MANIFEST_FILE}")
            files = {str(file).removeprefix(str(place)): _stamp(file) for file in found}
        stamps = {}
        for file, stamp in files.items():
            name, _, revision = file.removesuffix(f"/{MANIFEST_FILE}").rpartition("/")
            if file.endswith(MANIFEST_FILE) and is_path(path := f"mint://{run}{name}@{revision}"):
                stamps[parse_path(path)] = stamp
        return {path: stamps[path] for path in sorted(stamps)}


def _stamp(file: Path) -> Stamp:
    try:
        found = os.stat(file, follow_symlinks=False)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _use(manifest: Manifest) -> tuple[str, str]:
    """Whose a revision is, and as what it counts."""
    if manifest.kind == MERGED_WEIGHTS:
        return manifest.tenant, "merged_models"
    if not manifest.named:
        return manifest.tenant, "snapshots"
    uploaded = manifest.request and not manifest.source  # a copy tells of what
    return manifest.tenant, "uploads" if uploaded else "checkpoints"

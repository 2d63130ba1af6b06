"""The store in a local folder, which several processes and hosts may share.

It keeps nothing in memory.
"""

import errno
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from checkpoint_store import adapter_files, retention, revisions
from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.layout import StoreLayout
from checkpoint_store.manifest import Manifest, encode_manifest
from checkpoint_store.opened import OpenCheckpoint
from checkpoint_store.paths import CheckpointKind, check_name, parse_path
from mint_core.errors import AlreadyExists, CheckpointNotFound, ResourceExhausted
from mint_core.lora.spec import AdapterArrays, AdapterSpec

logger = logging.getLogger(__name__)

_STAGING_LIMIT = timedelta(days=1)  # no publish takes so long: its writer is dead


@dataclass(frozen=True, slots=True)
class Published:
    path: str  # means the newest revision of the name
    revision_path: str  # means this revision for good


class CheckpointStore:
    """Blocking calls, safe from any thread. Another tenant's checkpoint is not found."""

    def __init__(self, root: Path) -> None:
        self._layout = StoreLayout(root)

    def publish(
        self,
        *,
        training_run_id: str,
        kind: CheckpointKind,
        name: str | None,
        tenant: str,
        base_model: str,
        base_fingerprint: str,
        spec: AdapterSpec,
        weights: AdapterArrays,
        exp_avg: AdapterArrays | None = None,
        exp_avg_sq: AdapterArrays | None = None,
        step: int,
        metadata: Mapping[str, str] | None = None,
        sequence: int = 0,
        overwrite: bool = True,
        expire_time: datetime | None = None,
    ) -> Published:
        """Saves the next revision of a name, or an unnamed snapshot. Readers see all or nothing.

        Without `overwrite`, a name that exists is AlreadyExists. With a `sequence`, to save it once
        more under the same name changes nothing: a crash may have hidden that it was saved.
        """
        manifest = Manifest(
            tenant=tenant,
            training_run_id=check_name(training_run_id, field="training_run_id"),
            kind=kind,
            name=f"snapshot-{uuid4().hex}" if name is None else check_name(name),
            revision=1,
            base_model=base_model,
            base_fingerprint=base_fingerprint,
            spec=spec,
            step=step,
            create_time=datetime.now(UTC),
            expire_time=expire_time,
            unused_limit_s=retention.UNUSED_LIMIT_S if name is None else None,
            metadata=dict(metadata or {}),
            sequence=sequence,
        )
        assert (exp_avg is None) == (exp_avg_sq is None), "one moment without the other"
        for arrays in (weights, exp_avg, exp_avg_sq):
            if arrays is not None:
                adapter_files.check_arrays(str(manifest.path), spec, arrays)
        with self._staging() as staging:
            adapter_files.write_adapter(staging, spec, base_model, weights)
            if exp_avg is not None and exp_avg_sq is not None:
                adapter_files.write_moments(staging, exp_avg, exp_avg_sq)
            files = adapter_files.flush_files(staging)
            return self._place(staging, replace(manifest, files=files), overwrite)

    def describe(self, path: str, *, tenant: str, kind: CheckpointKind | None = None) -> Manifest:
        """The manifest of the revision that `path` means now; with `kind`, only of that kind."""
        asked = parse_path(path, kind=kind)
        now = datetime.now(UTC)
        for manifest in self._layout.newest_first(asked):
            if manifest.tenant == tenant and not retention.past_expiry(manifest, now):
                return manifest
        raise CheckpointNotFound(path)

    def resolve(self, path: str, *, tenant: str, kind: CheckpointKind | None = None) -> str:
        """The path of the revision that `path` means now."""
        return str(self.describe(path, tenant=tenant, kind=kind).revision_path)

    def open(self, path: str, *, tenant: str, kind: CheckpointKind | None = None) -> OpenCheckpoint:
        """Verifies every file of the revision that `path` means now, and notes its use."""
        manifest = self.describe(path, tenant=tenant, kind=kind)
        folder = self._layout.revision_folder(manifest.revision_path)
        revisions.renew_lease(folder)
        for name, entry in manifest.files.items():
            try:
                adapter_files.verify_file(str(manifest.revision_path), folder / name, entry)
            except CheckpointDamaged:
                if not (folder / revisions.MANIFEST_FILE).exists():  # deleted meanwhile
                    raise CheckpointNotFound(path) from None
                raise
        return OpenCheckpoint(manifest, folder)

    def renew(self, path: str, *, tenant: str) -> None:
        """Notes that a revision is still in use, so that it is kept for another while."""
        manifest = self.describe(path, tenant=tenant)
        revisions.renew_lease(self._layout.revision_folder(manifest.revision_path))

    def list(
        self,
        *,
        tenant: str,
        training_run_id: str | None = None,
        kind: CheckpointKind | None = None,
    ) -> Sequence[Manifest]:
        """The newest revision of each of the tenant's names, newest first; no unnamed snapshots."""
        found: dict[str, Manifest] = {}
        now = datetime.now(UTC)
        for manifest in self._layout.all_revisions(training_run_id):
            mine = manifest.tenant == tenant and kind in (None, manifest.kind)
            if mine and manifest.named and not retention.past_expiry(manifest, now):
                found[str(manifest.path)] = manifest  # revisions come in order: the newest stays
        return sorted(found.values(), key=lambda m: (m.create_time, str(m.path)), reverse=True)

    def delete(self, path: str, *, tenant: str) -> None:
        """Deletes one revision, or without `@<revision>` the name with all its revisions."""
        asked = parse_path(path)
        found = [m for m in self._layout.newest_first(asked) if m.tenant == tenant]
        if not found:
            raise CheckpointNotFound(path)
        for manifest in found:
            revisions.bury(self._layout.revision_folder(manifest.revision_path))

    def delete_run(self, training_run_id: str, *, tenant: str, named: bool = False) -> None:
        """Deletes a run's unnamed snapshots, and its named checkpoints if asked."""
        for manifest in self._layout.all_revisions(check_name(training_run_id)):
            if manifest.tenant == tenant and (named or not manifest.named):
                revisions.bury(self._layout.revision_folder(manifest.revision_path))

    def sweep(self, *, now: datetime | None = None) -> int:
        """Removes what has expired and what dead writers left. Returns how many revisions went."""
        now = now or datetime.now(UTC)
        removed = 0
        for name in self._layout.names():
            held = [
                (
                    manifest,
                    revisions.last_used(self._layout.revision_folder(manifest.revision_path)),
                )
                for manifest in self._layout.revisions_of(name)
            ]
            for number in retention.removable_of_name(held, now):
                revisions.bury(self._layout.revision_folder(name.at(number)))
                removed += 1
            self._layout.tidy(name)
        self._layout.clear_staging(older_than=now - _STAGING_LIMIT)
        return removed

    def _place(self, staging: Path, manifest: Manifest, overwrite: bool) -> Published:
        path = manifest.path
        held = self._layout.revisions_of(path) if manifest.sequence else ()
        for earlier in held:
            if earlier.sequence == manifest.sequence:
                return Published(str(path), str(earlier.revision_path))

        def prepare(revision: int) -> None:
            now = datetime.now(UTC)
            held = self._layout.newest_first(path)
            if not overwrite and any(not retention.past_expiry(m, now) for m in held):
                raise AlreadyExists(
                    f"checkpoint `{path}` exists; choose another `name` or set `overwrite`",
                    path=path,
                )
            encoded = encode_manifest(replace(manifest, revision=revision))
            revisions.write_durably(staging / revisions.MANIFEST_FILE, encoded)
            revisions.flush_folder(staging)

        revision = revisions.place(staging, self._layout.name_folder(path), prepare)
        return Published(str(path), str(path.at(revision)))

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder to write in, on the store's file system, gone afterwards."""
        staging = self._layout.staging / uuid4().hex
        try:
            revisions.make_folder(self._layout.staging)
            staging.mkdir()
            yield staging
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ResourceExhausted(
                "the checkpoint store has no space left; delete checkpoints, then save again"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

"""The store in a folder or an object store, which several processes and hosts may share.

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
from checkpoint_store.copies import Copies
from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.layout import StoreLayout
from checkpoint_store.manifest import MANIFEST_FILE, Manifest, encode_manifest
from checkpoint_store.object_path import ObjectPath
from checkpoint_store.opened import OpenCheckpoint
from checkpoint_store.paths import (
    SAMPLER_WEIGHTS,
    CheckpointKind,
    CheckpointPath,
    check_name,
    check_new_name,
    generated_name,
    parse_path,
)
from checkpoint_store.places import Place, flush_folder, make_folder, write_durably
from checkpoint_store.row_file import RowFile
from checkpoint_store.snapshot_folder import SnapshotFolder
from mint_core.errors import AlreadyExists, CheckpointNotFound, ResourceExhausted
from mint_core.lora.spec import AdapterArrays, AdapterSpec

logger = logging.getLogger(__name__)

_STAGING_LIMIT = timedelta(days=1)  # no publish takes so long: its writer is dead


@dataclass(frozen=True, slots=True)
class Published:
    """What a publish made."""

    manifest: Manifest

    @property
    def path(self) -> str:
        """Means the newest revision of the name."""
        return str(self.manifest.path)

    @property
    def revision_path(self) -> str:
        """Means this revision for good."""
        return str(self.manifest.revision_path)


class CheckpointStore:
    """Blocking calls, safe from any thread. Another tenant's checkpoint is not found."""

    def __init__(
        self, root: Place, snapshots: SnapshotFolder | None = None, local: Path | None = None
    ) -> None:
        """With `snapshots`, those of this host are found there too, stored yet or not. `local` is
        the folder for drafts and copies if the root is none.
        """
        self._copies: Copies | None = None
        if isinstance(root, ObjectPath):
            assert local is not None, "no folder for copies"
            self._copies = Copies(local / ".copies")
        else:
            local = root
        self._layout = StoreLayout(root, local)
        self._snapshots = snapshots

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
        manifest = new_manifest(
            training_run_id=training_run_id,
            kind=kind,
            name=name,
            tenant=tenant,
            base_model=base_model,
            base_fingerprint=base_fingerprint,
            spec=spec,
            step=step,
            metadata=metadata,
            expire_time=expire_time,
            sequence=sequence,
        )
        return self.publish_as(manifest, weights, exp_avg, exp_avg_sq, overwrite=overwrite)

    def publish_as(
        self,
        manifest: Manifest,
        weights: AdapterArrays,
        exp_avg: AdapterArrays | None = None,
        exp_avg_sq: AdapterArrays | None = None,
        *,
        overwrite: bool = True,
    ) -> Published:
        """As `publish`, of what `new_manifest` has described."""
        assert (exp_avg is None) == (exp_avg_sq is None), "one moment without the other"
        for arrays in (weights, exp_avg, exp_avg_sq):
            if arrays is not None:
                adapter_files.check_arrays(str(manifest.path), manifest.spec, arrays)
        with self._staging() as staging:
            adapter_files.write_adapter(staging, manifest.spec, manifest.base_model, weights)
            if exp_avg is not None and exp_avg_sq is not None:
                adapter_files.write_moments(staging, exp_avg, exp_avg_sq)
            published = self._place(staging, manifest, overwrite)
        if not manifest.named:
            self.recant(manifest.path)
        return published

    def draft(self) -> Path:
        """Where to write a row's numbers to, on the store's file system."""
        make_folder(self._layout.staging)
        return self._layout.staging / f"{uuid4().hex}.row"

    def has(self, revision: CheckpointPath) -> bool:
        """Whether a revision is stored, whoever's it is."""
        return any(self._layout.newest_first(revision))

    def announce(self, snapshot: Manifest) -> None:
        """Says that a snapshot will be stored, to those who cannot see it in memory."""
        revisions.announce(self._layout.name_folder(snapshot.path), snapshot.tenant)

    def recant(self, snapshot: CheckpointPath) -> None:
        """Takes back that a snapshot will be stored."""
        revisions.recant(self._layout.name_folder(snapshot))

    def announced(self, path: str, *, tenant: str) -> bool:
        """Whether a snapshot of the tenant's is about to be stored."""
        return revisions.announced(self._layout.name_folder(parse_path(path))) == tenant

    def describe(self, path: str, *, tenant: str, kind: CheckpointKind | None = None) -> Manifest:
        """The manifest of the revision that `path` means now; with `kind`, only of that kind."""
        return self.find(path, tenant=tenant, kind=kind).manifest

    def resolve(self, path: str, *, tenant: str, kind: CheckpointKind | None = None) -> str:
        """The path of the revision that `path` means now."""
        return str(self.describe(path, tenant=tenant, kind=kind).revision_path)

    def find(self, path: str, *, tenant: str, kind: CheckpointKind | None = None) -> OpenCheckpoint:
        """The revision that `path` means now, in memory if it is there; its files unverified."""
        asked = parse_path(path, kind=kind)
        row, damage = self._row(asked.at(asked.revision or 1)) if asked.unnamed else (None, None)
        if row is not None:
            if row.manifest.tenant != tenant:
                raise CheckpointNotFound(path)
            manifest = row.manifest
        else:
            try:
                manifest = self._stored(asked, tenant)
            except CheckpointNotFound:
                raise damage or CheckpointNotFound(path) from None
            row = self._row_of(manifest)
        return self._opened(manifest, row)

    def open(self, path: str, *, tenant: str, kind: CheckpointKind | None = None) -> OpenCheckpoint:
        """As `find`, and verifies every file unless memory has the revision. Notes its use."""
        found = self.find(path, tenant=tenant, kind=kind)
        found.note_use()
        if found.row is None:
            self.verify(found)
        return found

    def verify(self, found: OpenCheckpoint) -> None:
        """Refuses files that are not those which were published."""
        path = str(found.manifest.revision_path)
        files = self._layout.files_folder(found.manifest)
        try:
            if self._copies is not None and isinstance(files, ObjectPath):
                self._copies.bring(found.manifest, files)
                return
            for name, entry in found.manifest.files.items():
                adapter_files.verify_file(path, found.folder / name, entry)
        except CheckpointDamaged:
            if not (found.place / MANIFEST_FILE).exists():  # deleted meanwhile
                raise CheckpointNotFound(path) from None
            raise

    def renew(self, path: str, *, tenant: str) -> None:
        """Notes that a revision is still in use, so that it is kept for another while."""
        self.find(path, tenant=tenant).note_use()

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
            revisions.settle_burials(self._layout.name_folder(asked))
            raise CheckpointNotFound(path)
        for manifest in found:
            revisions.bury(self._layout.revision_folder(manifest.revision_path))

    def delete_run(self, training_run_id: str, *, tenant: str, named: bool = False) -> None:
        """Deletes a run's unnamed snapshots, and its named checkpoints if asked."""
        for manifest in self._layout.all_revisions(check_name(training_run_id)):
            if manifest.tenant == tenant and (named or not manifest.named):
                revisions.bury(self._layout.revision_folder(manifest.revision_path))
        for name in self._layout.names(training_run_id):
            revisions.settle_burials(self._layout.name_folder(name))

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
            self._layout.tidy(name, announced_after=now - _STAGING_LIMIT)
        self._layout.clear_staging(older_than=now - _STAGING_LIMIT)
        return removed

    def _stored(self, asked: CheckpointPath, tenant: str) -> Manifest:
        now = datetime.now(UTC)
        for manifest in self._layout.newest_first(asked):
            if manifest.tenant == tenant and not retention.past_expiry(manifest, now):
                return manifest
        raise CheckpointNotFound(str(asked))

    def _opened(self, manifest: Manifest, row: RowFile | None) -> OpenCheckpoint:
        place = self._layout.revision_folder(manifest.revision_path)
        if isinstance(place, ObjectPath):
            assert self._copies is not None
            return OpenCheckpoint(manifest, self._copies.folder(manifest), place, row)
        return OpenCheckpoint(manifest, place, place, row)

    def _row_of(self, manifest: Manifest) -> RowFile | None:
        """A stored revision in memory."""
        if manifest.kind != SAMPLER_WEIGHTS:
            return None
        row, _ = self._row(manifest.revision_path)
        if row is None or row.manifest.create_time != manifest.create_time:
            return None  # a store that was made anew numbers from 1 again
        return row

    def _row(
        self, revision: CheckpointPath
    ) -> tuple[RowFile, None] | tuple[None, CheckpointDamaged | None]:
        """A revision in memory, or what is wrong with it."""
        if self._snapshots is None:
            return None, None
        try:
            row = self._snapshots.find(revision)
        except CheckpointDamaged as error:
            logger.warning("%s", error)
            return None, error
        if row is None or retention.past_memory(row.manifest, datetime.now(UTC)):
            return None, None
        return row, None

    def _place(self, staging: Path, manifest: Manifest, overwrite: bool) -> Published:
        path = manifest.path
        for earlier in self._layout.revisions_of(path) if manifest.sequence else ():
            if earlier.sequence == manifest.sequence:
                revisions.settle(self._layout.name_folder(path))
                return Published(earlier)
        described = replace(
            manifest,
            files=adapter_files.flush_files(staging),
            files_folder=self._layout.files_folder_of(staging),
        )

        def prepare(revision: int) -> None:
            now = datetime.now(UTC)
            held = self._layout.newest_first(path)
            if not overwrite and any(not retention.past_expiry(m, now) for m in held):
                raise AlreadyExists(
                    f"checkpoint `{path}` exists; choose another `name` or set `overwrite`",
                    path=path,
                )
            encoded = encode_manifest(replace(described, revision=revision))
            write_durably(staging / MANIFEST_FILE, encoded)
            flush_folder(staging)

        revision = revisions.place(staging, self._layout.name_folder(path), prepare)
        return Published(replace(described, revision=revision))

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder to write in, on the store's file system, gone afterwards."""
        staging = self._layout.staging / uuid4().hex
        try:
            make_folder(self._layout.staging)
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


def new_manifest(
    *,
    training_run_id: str,
    kind: CheckpointKind,
    name: str | None,
    tenant: str,
    base_model: str,
    base_fingerprint: str,
    spec: AdapterSpec,
    step: int,
    metadata: Mapping[str, str] | None = None,
    sequence: int = 0,
    expire_time: datetime | None = None,
) -> Manifest:
    """Of a checkpoint that is about to be made; without a name, of an unnamed snapshot."""
    return Manifest(
        tenant=tenant,
        training_run_id=check_name(training_run_id, field="training_run_id"),
        kind=kind,
        name=generated_name() if name is None else check_new_name(name),
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

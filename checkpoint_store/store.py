"""The store in a folder or an object store, which several processes and hosts may share."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from checkpoint_store import retention, revisions
from checkpoint_store.adapter_files import check_arrays, read_weights, verify_file
from checkpoint_store.copies import Copies, ObjectFolder
from checkpoint_store.errors import CheckpointDamaged
from checkpoint_store.layout import StoreLayout, share_files
from checkpoint_store.manifest import MANIFEST_FILE, Manifest, encode_manifest
from checkpoint_store.memory.published_row import PublishedRow, find_row
from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.objects.places import Place
from checkpoint_store.paths import (
    MERGED_WEIGHTS,
    SAMPLER_WEIGHTS,
    CheckpointKind,
    CheckpointPath,
    check_name,
    check_new_name,
    parse_path,
)
from checkpoint_store.row_file import RowMissing
from mint_core.errors import CheckpointNotFound, InvalidRequest
from mint_core.lora.row_layout import Floats
from mint_core.turns import Workers

logger = logging.getLogger(__name__)

THREADS = 8  # that wait for the disk, or for an object store
_LEFT_LIMIT = timedelta(days=1)  # no publish takes so long, and no request comes again so late


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """A revision, whose files `CheckpointStore.open` has verified. Arrays have PEFT's names."""

    manifest: Manifest
    # Opens with `PeftModel.from_pretrained`. Absent while a snapshot is not stored; of an object
    # store's checkpoints it holds copies, for a while, once they are verified.
    folder: Path
    place: Place | None  # in the store, if that is here
    row: PublishedRow | None = None  # the same weights in memory

    def note_use(self) -> None:
        """Keeps the revision for another while."""
        if self.place is not None:
            revisions.renew_lease(self.place)

    @property
    def copied(self) -> bool:
        """Whether the folder holds copies."""
        return self.folder != self.place

    def weights(self) -> dict[str, Floats]:
        with self.present():
            weights = self.row.weights() if self.row else read_weights(self.folder)
        check_arrays(str(self.manifest.revision_path), self.manifest.spec, weights)
        return weights

    @contextmanager
    def present(self) -> Iterator[None]:
        """Says CheckpointNotFound where a file is no longer there."""
        try:
            yield
        except (FileNotFoundError, RowMissing):  # deleted since it was opened
            raise CheckpointNotFound(str(self.manifest.revision_path)) from None


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep has done."""

    removed: int  # revisions
    next_expiry: datetime | None  # when the next revision's time is over


class CheckpointStore:
    """Blocking calls, safe from any thread. Another tenant's checkpoint is not found."""

    appear_limit_s = 1.0  # for what another host has just published

    def __init__(
        self,
        root: Place,
        snapshots: Path | None = None,
        local: Path | None = None,
        quota_bytes: int = 0,
    ) -> None:
        """With a folder of `snapshots`, those of this host are found there too, stored yet or not.
        `local` is the folder for drafts and copies if the root is none. `quota_bytes`: what is
        published of one tenant; 0: without a limit.
        """
        if isinstance(root, ObjectPath):
            assert local is not None, "no folder for copies"
            self._copies = Copies(local / ".copies")  # of an object store alone
        else:
            local = root
        self._layout = StoreLayout(root, local)
        self._snapshots = snapshots
        self._quota_bytes = quota_bytes
        self.in_turn = Workers(THREADS, "store").run  # for those who must not block

    @contextmanager
    def staging(self, tenant: str = "", size_bytes: int = 0) -> Iterator[Path]:
        """A folder to write in, on the store's file system, gone afterwards. A full disk is
        ResourceExhausted, and so is a tenant's full share, where about so much comes into it.
        """
        room = self._layout.index.room(tenant, size_bytes, self._quota_bytes)
        with room, self._layout.staging() as folder:
            yield folder

    def publish_folder(
        self, manifest: Manifest, staging: Path, *, overwrite: bool = True
    ) -> Manifest:
        """Publishes what has been written to a folder of `staging`, as the next revision of its
        name. Readers see all of it or nothing.

        Without `overwrite`, a name that exists is AlreadyExists. What one request or call has
        published twice is there once: a crash may have hidden that it was.
        """
        published = self._layout.publish(staging, manifest, overwrite=overwrite)
        if not manifest.named:
            self.recant(manifest.path)
        return published

    def copy(
        self,
        path: str,
        name: str,
        *,
        tenant: str,
        expire_time: datetime | None = None,
        request: str = "",
    ) -> Manifest:
        """Publishes a stored revision once more, under another name of its run. A name that exists
        is AlreadyExists, unless the same request has made it.
        """
        asked = parse_path(path)
        target = CheckpointPath(asked.training_run_id, asked.kind, check_new_name(name))
        if made := self._layout.made_by(target, (request, "", 0)):
            return made
        found = self.find_stored(path, tenant=tenant)
        found.note_use()
        self.verify(found)
        manifest = replace(
            found.manifest,
            name=target.name,
            create_time=datetime.now(UTC),
            expire_time=expire_time,
            unused_limit_s=None,
            source=str(found.manifest.revision_path),
            request=request,
            sequence=0,
            mark="",
        )
        with self.staging(tenant, manifest.size_bytes) as staging:
            with found.present():
                share_files(manifest.files, found.folder, staging)
            return self._layout.publish(staging, manifest, overwrite=False)

    def update(self, path: str, *, tenant: str, change: Callable[[Manifest], Manifest]) -> Manifest:
        """Replaces what a revision says of itself. Its files, and what is in memory, stay."""
        asked = parse_path(path)
        if asked.unnamed:
            raise InvalidRequest(
                f"`path` {path!r} is an unnamed snapshot, which is kept for as long as it is used; "
                "copy it under a name to keep it otherwise",
                field="path",
                path=path,
            )
        changed = change(self._stored(asked, tenant))
        folder = self._layout.revision_folder(changed.revision_path)
        if not revisions.rewrite_manifest(folder, encode_manifest(changed)):
            raise CheckpointNotFound(path)
        return changed

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

    def find(self, path: str, *, tenant: str, kind: CheckpointKind | None = None) -> OpenCheckpoint:
        """The revision that `path` means now, in memory if it is there; its files unverified."""
        asked = parse_path(path, kind=kind)
        in_memory = asked.unnamed and asked.kind == SAMPLER_WEIGHTS
        row, damage = self._row(asked.at(asked.revision or 1)) if in_memory else (None, None)
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

    def find_stored(self, path: str, *, tenant: str) -> OpenCheckpoint:
        """As `find`, but only what is in the store."""
        manifest = self._stored(parse_path(path), tenant)
        return self._opened(manifest)

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
            if isinstance(files, ObjectPath):
                self._copies.bring(found.manifest, ObjectFolder(files))
                return
            for name, entry in found.manifest.files.items():
                verify_file(path, found.folder / name, entry)
        except CheckpointDamaged:
            assert found.place is not None, "not of this store"
            if not (found.place / MANIFEST_FILE).exists():  # deleted meanwhile
                raise CheckpointNotFound(path) from None
            raise

    def interrupt(self) -> None:
        """Its calls come to an end by themselves."""

    def list(
        self,
        *,
        tenant: str,
        training_run_id: str | None = None,
        run_prefix: str = "",
        kind: CheckpointKind | None = None,
    ) -> Sequence[Manifest]:
        """The newest revision of each of the tenant's names, newest first; no unnamed snapshots."""
        found: dict[str, Manifest] = {}
        now = datetime.now(UTC)
        runs = [training_run_id] if training_run_id else self._layout.runs(run_prefix)
        for manifest in self._layout.index.of_tenant(tenant, runs):
            wanted = manifest.named and kind in (None, manifest.kind)
            if wanted and not retention.past_expiry(manifest, now):
                found[str(manifest.path)] = manifest  # revisions come in order: the newest stays
        return sorted(found.values(), key=lambda m: (m.create_time, str(m.path)), reverse=True)

    def delete(self, path: str, *, tenant: str, request: str = "") -> None:
        """Deletes one revision, or without `@<revision>` the name with all its revisions. What one
        request deletes twice is deleted once: a newer revision of the name stays.
        """
        asked = parse_path(path)
        found = [m for m in self._newest_first(asked, tenant) if m.tenant == tenant]
        last = revisions.buried_by(self._layout.name_folder(asked), request)
        if last is not None:
            found = [manifest for manifest in found if manifest.revision <= last]
        if not found:
            revisions.settle_burials(self._layout.name_folder(asked))
            if last is None:
                raise CheckpointNotFound(path)
        for manifest in found:  # newest first: of a deletion cut short, the newest one tells
            self._layout.bury(manifest, request)

    def merged(self, source: Manifest, dtype: str, request: str) -> Manifest | None:
        """The newest model that was merged from a revision in a type, or for a request."""
        now, run = datetime.now(UTC), source.training_run_id
        made = [
            manifest
            for manifest in self._layout.index.of_tenant(source.tenant, [run])
            if manifest.kind == MERGED_WEIGHTS and not retention.past_expiry(manifest, now)
            if manifest.request == request
            or (manifest.source, manifest.dtype) == (str(source.revision_path), dtype)
        ]
        return made[-1] if made else None

    def has_deleted(self, training_run_id: str, request: str) -> bool:
        """Whether a request has deleted a checkpoint of a run."""
        names = self._layout.names([training_run_id])
        folders = (self._layout.name_folder(name) for name in names)
        return any(revisions.buried_by(folder, request) is not None for folder in folders)

    def delete_run(self, training_run_id: str, *, tenant: str, named: bool = False) -> None:
        """Deletes a run's unnamed snapshots, and its named checkpoints if asked."""
        for manifest in self._layout.index.all_of(check_name(training_run_id)):
            if manifest.tenant == tenant and (named or not manifest.named):
                self._layout.bury(manifest)
        for name in self._layout.names([training_run_id]):
            revisions.settle_burials(self._layout.name_folder(name))

    def sweep(self, *, now: datetime | None = None) -> Swept:
        """Removes what has expired and what dead writers left."""
        now = now or datetime.now(UTC)
        removed = 0
        expiries: list[datetime] = []
        runs = self._layout.runs()
        self._layout.index.keep(runs)
        for run in runs:
            of_names: dict[CheckpointPath, list[Manifest]] = {}
            for manifest in self._layout.index.all_of(run):
                of_names.setdefault(manifest.path, []).append(manifest)
            for name in self._layout.names([run]):
                held = of_names.get(name, [])
                expiries += retention.expiries(held, now)
                try:
                    removed += self._sweep(name, held, now)
                except (OSError, CheckpointDamaged):  # of one name; the others are swept
                    logger.exception("`%s` could not be swept", name)
        self._layout.clear_staging(older_than=now - _LEFT_LIMIT)
        return Swept(removed, min(expiries, default=None))

    def _sweep(self, name: CheckpointPath, held: Sequence[Manifest], now: datetime) -> int:
        """How many revisions of a name it has removed, of those that there are."""
        folders = (self._layout.revision_folder(manifest.revision_path) for manifest in held)
        removable = retention.removable(held, list(map(revisions.last_used, folders)), now)
        for at in removable:
            self._layout.bury(held[at])
        self._layout.tidy(name, since=now - _LEFT_LIMIT)
        return len(removable)

    def size_bytes(self, tenant: str) -> Mapping[str, int]:
        """What a tenant's checkpoints, snapshots, uploads and merged models take, as far as this
        process knows: it learns of others' at sweeps and lists.
        """
        return self._layout.index.size_bytes(tenant)

    def _stored(self, asked: CheckpointPath, tenant: str) -> Manifest:
        now = datetime.now(UTC)
        for manifest in self._newest_first(asked, tenant):
            if manifest.tenant == tenant and not retention.past_expiry(manifest, now):
                return manifest
        raise CheckpointNotFound(str(asked))

    def _newest_first(self, asked: CheckpointPath, tenant: str) -> Iterator[Manifest]:
        """Of damage in another tenant's run, nobody hears more than that there is nothing."""
        try:
            yield from self._layout.newest_first(asked)
        except CheckpointDamaged:
            if not self._layout.index.may_tell(tenant, asked.training_run_id):
                raise CheckpointNotFound(str(asked)) from None
            raise

    def _opened(self, manifest: Manifest, row: PublishedRow | None = None) -> OpenCheckpoint:
        place = self._layout.revision_folder(manifest.revision_path)
        folder = place if isinstance(place, Path) else self._copies.folder(manifest)
        return OpenCheckpoint(manifest, folder, place, row)

    def _row_of(self, manifest: Manifest) -> PublishedRow | None:
        """A stored revision in memory."""
        if manifest.kind != SAMPLER_WEIGHTS:
            return None
        row, _ = self._row(manifest.revision_path)
        if row is None or row.manifest.create_time != manifest.create_time:
            return None  # a store that was made anew numbers from 1 again
        return row

    def _row(
        self, revision: CheckpointPath
    ) -> tuple[PublishedRow, None] | tuple[None, CheckpointDamaged | None]:
        """A revision in memory, or what is wrong with it."""
        if self._snapshots is None:
            return None, None
        try:
            row = find_row(self._snapshots, revision)
        except CheckpointDamaged as error:
            logger.warning("%s", error)
            return None, error
        if row is None or retention.past_memory(row.manifest, datetime.now(UTC)):
            return None, None
        return row, None

"""How revisions come into the store: written beside, shown by one rename."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from checkpoint_store import adapter_files, retention, revisions
from checkpoint_store.errors import full_disk_told
from checkpoint_store.layout import StoreLayout
from checkpoint_store.manifest import MANIFEST_FILE, FileEntry, Manifest, encode_manifest
from checkpoint_store.paths import (
    CheckpointKind,
    CheckpointPath,
    check_name,
    check_new_name,
    generated_name,
)
from checkpoint_store.places import flush_folder, make_folder, write_durably
from mint_core.errors import AlreadyExists
from mint_core.lora.spec import AdapterSpec

_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP)


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


class Publisher:
    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder to write in, on the store's file system, gone afterwards."""
        staging = self._layout.staging / uuid4().hex
        try:
            with full_disk_told():
                make_folder(self._layout.staging)
                staging.mkdir()
                yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def place(self, staging: Path, manifest: Manifest, *, overwrite: bool) -> Published:
        """Shows what was staged as the next revision of its name. What a request or a run's call
        publishes once more is there already: a crash may have hidden that.
        """
        path = manifest.path
        if made := self.made(manifest):
            revisions.settle(self._layout.name_folder(path))
            return Published(made)
        described = replace(
            manifest,
            files=manifest.files or adapter_files.flush_files(staging),
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

    def made(self, manifest: Manifest) -> Manifest | None:
        """The revision of the same name that the same request or call has made."""
        if manifest.maker is None:
            return None
        held = self._layout.revisions_of(manifest.path)
        return next((m for m in held if m.maker == manifest.maker), None)

    def made_by(self, path: CheckpointPath, request: str) -> Manifest | None:
        """The revision of a name that a request has made."""
        held = self._layout.revisions_of(path) if request else []
        return next((m for m in held if m.request == request), None)


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
    expire_time: datetime | None = None,
    source: str = "",
    head_untied: bool = False,
    request: str = "",
    sequence: int = 0,
    mark: str = "",
    files: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Of a checkpoint that is about to be made; without a name, of an unnamed snapshot."""
    return Manifest(
        tenant=tenant,
        training_run_id=check_name(training_run_id, field="training_run_id"),
        kind=kind,
        name=generated_name() if name is None else check_new_name(name),
        revision=1 if name is None else 0,
        base_model=base_model,
        base_fingerprint=base_fingerprint,
        spec=spec,
        step=step,
        create_time=datetime.now(UTC),
        expire_time=expire_time,
        unused_limit_s=retention.UNUSED_LIMIT_S if name is None else None,
        metadata=dict(metadata or {}),
        source=source,
        head_untied=head_untied,
        request=request,
        sequence=sequence,
        mark=mark,
        files=files or {},
    )

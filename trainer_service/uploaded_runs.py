"""Runs of uploaded adapters. They are nothing but their checkpoints in the store: no engine has
them, and they end with the last of those.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from checkpoint_store import Manifest

PREFIX = "uploaded-"


@dataclass(frozen=True, slots=True)
class UploadedRun:
    """At one moment, for answers."""

    first: Manifest
    last: Manifest

    @property
    def training_run_id(self) -> str:
        return self.first.training_run_id


def uploaded_run_id(tenant: str, request_id: str) -> str:
    """The run of an upload. It follows from the request, so that one that is sent again after a
    restart meets what it has made.
    """
    digest = hashlib.sha256(f"{tenant}\0{request_id}".encode()).hexdigest()
    return f"{PREFIX}{digest[:16]}"


def is_uploaded(training_run_id: str) -> bool:
    return training_run_id.startswith(PREFIX)


def uploaded_runs(manifests: Iterable[Manifest]) -> Sequence[UploadedRun]:
    """The runs to which checkpoints belong."""
    runs: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        runs.setdefault(manifest.training_run_id, []).append(manifest)
    return [
        UploadedRun(
            min(found, key=lambda manifest: manifest.create_time),
            max(found, key=lambda manifest: manifest.create_time),
        )
        for found in runs.values()
    ]

"""The store of a sampler that gets adapters from a trainer's host.

What a path means is asked each time that another store would be looked at, so what was published is
seen by the next call, and nothing is known here that the trainer would deny. Files are copied to
this host and checked before they are used.
"""

import time
from pathlib import Path

from checkpoint_store.copies import Copies
from checkpoint_store.manifest import Manifest
from checkpoint_store.paths import CheckpointKind, parse_path
from checkpoint_store.store import THREADS, OpenCheckpoint
from mint_core.turns import Workers
from sampler_service.wire_store.access import TrainerAccess
from sampler_service.wire_store.answers import manifest_of
from sampler_service.wire_store.downloads import TrainerFiles
from sampler_service.wire_store.errors import StoreRefused, StoreUnreachable
from sampler_service.wire_store.trainer import Trainer

STORED_LIMIT_S = 300.0  # for a snapshot that the trainer is still writing to its store
STORED_INTERVAL_S = 0.05


class WireStore:
    """Blocking calls, safe from any thread. Another tenant's checkpoint is not found."""

    appear_limit_s = 0.0  # the trainer knows at once what it has

    def __init__(self, trainer: Trainer, local: Path) -> None:
        self._trainer = trainer
        self._copies = Copies(local / ".copies")
        self.in_turn = Workers(THREADS, "store").run

    def find(self, path: str, *, tenant: str, kind: CheckpointKind) -> OpenCheckpoint:
        """The revision that `path` means now; its files are perhaps not here."""
        manifest = self._ask(path, tenant, kind)
        return OpenCheckpoint(manifest, self._copies.folder(manifest), None)

    def announced(self, path: str, *, tenant: str) -> bool:
        """What is on its way is there already, by the trainer's word."""
        return False

    def verify(self, found: OpenCheckpoint) -> None:
        """Brings copies that are to the byte what was published."""
        manifest = self._stored(found.manifest)
        self._copies.bring(manifest, TrainerFiles(self._trainer, manifest.tenant))

    def interrupt(self) -> None:
        """Ends what is under way."""
        self._trainer.close()

    def _stored(self, manifest: Manifest) -> Manifest:
        """The same with its files, which a snapshot has once it is more than in memory."""
        path, ends_s = str(manifest.revision_path), time.monotonic() + STORED_LIMIT_S
        while not manifest.files:
            if time.monotonic() > ends_s:
                problem = f"snapshot `{path}` is not in its store yet"
                raise StoreUnreachable(self._trainer.access.address, problem)
            time.sleep(STORED_INTERVAL_S)
            manifest = self._ask(path, manifest.tenant, manifest.kind)
        return manifest

    def _ask(self, path: str, tenant: str, kind: CheckpointKind) -> Manifest:
        asked = parse_path(path, kind=kind)
        told = self._trainer.checkpoint(path, tenant)
        try:
            return manifest_of(told, asked, tenant)
        except ValueError as error:
            problem = f"it answers with nonsense about `{path}`: {error}"
            raise StoreRefused(self._trainer.access.address, problem) from None


def open_wire_store(access: TrainerAccess, local: Path) -> WireStore:
    """The checkpoints of a trainer's host, copied to `local`. Refuses a trainer that is there and
    will not do; one that is away may come later.
    """
    trainer = Trainer(access)
    trainer.greet()
    return WireStore(trainer, local)

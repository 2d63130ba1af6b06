"""The stores that services are told of: a folder, an object store, or a trainer's host, which is
the sampler's own matter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from checkpoint_store.objects.object_path import ObjectPath
from checkpoint_store.objects.object_store import ObjectStore, is_object_address, parse_address
from checkpoint_store.paths import CheckpointKind
from checkpoint_store.store import CheckpointStore, OpenCheckpoint

T = TypeVar("T")


class AdapterStore(Protocol):
    """What a sampler needs of any store; as CheckpointStore."""

    appear_limit_s: float

    async def in_turn(
        self, tenant: str, function: Callable[..., T], /, *args: Any, **options: Any
    ) -> T:
        """For those who must not block."""

    def find(self, path: str, *, tenant: str, kind: CheckpointKind) -> OpenCheckpoint:
        """The revision that `path` means now; its files unverified."""

    def announced(self, path: str, *, tenant: str) -> bool:
        """Whether a snapshot of the tenant's is about to be stored."""

    def verify(self, found: OpenCheckpoint) -> None:
        """Refuses files that are not those which were published."""

    def interrupt(self) -> None:
        """Ends what would be waited for, since the service stops."""


def is_wire_address(store: str) -> bool:
    """Whether a `store` is a trainer's address."""
    return store.startswith(("http://", "https://"))


def open_store(
    store: str, local: Path, snapshots: Path | None = None, *, saves: bool, quota_bytes: int = 0
) -> CheckpointStore:
    """The store that a service was told: a folder, or an object store by its URL, which is asked
    whether it can be used; `local` is for copies of its files then. `saves` says whether this
    process will.
    """
    if not is_object_address(store):
        return CheckpointStore(Path(store), snapshots, quota_bytes=quota_bytes)
    objects = ObjectStore(parse_address(store))
    objects.check(saves=saves)
    root = ObjectPath(objects, objects.address.prefix)
    return CheckpointStore(root, snapshots, local, quota_bytes)

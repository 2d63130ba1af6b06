"""Keys of an object store, handled as paths are."""

from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint_store.objects.object_store import ObjectStore


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """An object, or all those below a key, with what of `Path` the store needs. There are no
    folders: one is there while something is below it.
    """

    objects: ObjectStore
    key: str

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(self.objects, f"{self.key}/{name}".lstrip("/"))

    def __str__(self) -> str:
        return f"s3://{self.objects.address.bucket}/{self.key}"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.objects, self.key.rpartition("/")[0])

    def iterdir(self) -> Iterator["ObjectPath"]:
        folders, objects = self.objects.children(self.key)
        yield from (ObjectPath(self.objects, key) for key in (*folders, *objects))

    def exists(self) -> bool:
        """Whether there is an object."""
        return self.objects.find(self.key) is not None

    def read_bytes(self) -> bytes:
        return self.objects.read(self.key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object, if there is one: the store does not tell."""
        self.objects.remove(self.key)

    def rmdir(self) -> None:
        """There is nothing to remove."""

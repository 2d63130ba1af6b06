"""Parts of rows in host memory. Beside a GPU it is page-locked, so that copies need no other and go
on beside what computes.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from mint_core.lora.bank import Part, zero_vector
from trainer_service.engine.row_files import RowFiles, RowPart

logger = logging.getLogger(__name__)


class HostMemory:
    """Vectors for what a GPU copies. Locking takes long, so those given back wait for the next of
    their size.
    """

    def __init__(self, lock: Callable[[Tensor], bool], unlock: Callable[[Tensor], None]) -> None:
        """`lock` returns whether it could."""
        self._lock, self._unlock = lock, unlock
        self._locks = True  # until it once could not
        self._locked: set[int] = set()  # addresses
        self._spare: dict[int, list[Tensor]] = defaultdict(list)  # by size, in numbers
        self.spare_bytes = 0

    def take(self, size: int, room_bytes: int) -> Tensor:  # [size], of any content
        """One that is spare, or new; then with others that are spare it takes `room_bytes`."""
        if spare := self._spare[size]:
            self.spare_bytes -= 4 * size
            return spare.pop()
        self._shrink(room_bytes - 4 * size)
        vector = zero_vector(size, torch.device("cpu"))
        if self._locks:
            self._locks = self._lock(vector)
            if self._locks:
                self._locked.add(vector.data_ptr())
            else:
                logger.warning("host memory cannot be page-locked: rows come and go more slowly")
        return vector

    def give_back(self, vector: Tensor) -> None:
        """Takes back what `take` has given."""
        if vector.data_ptr() in self._locked:
            self._spare[len(vector)].append(vector)
            self.spare_bytes += vector.nbytes

    def _shrink(self, most_bytes: int) -> None:
        for spare in self._spare.values():
            while spare and self.spare_bytes > most_bytes:
                vector = spare.pop()
                self.spare_bytes -= vector.nbytes
                self._locked.remove(vector.data_ptr())
                self._unlock(vector)


def host_memory(device: torch.device) -> HostMemory | None:
    """Page-locked memory for a GPU; a CPU's rows are in host memory as they are."""
    return HostMemory(_lock_pages, _unlock_pages) if device.type == "cuda" else None


def _lock_pages(vector: Tensor) -> bool:
    # Not torch's own: that takes the next power of two, which bounds would have to count.
    if not int(torch.cuda.cudart().cudaHostRegister(vector.data_ptr(), vector.nbytes, 0)):
        return True
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")  # else the next launch would be told of the error
    return False


def _unlock_pages(vector: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(vector.data_ptr())


class HostRows:
    """Up to a limit; the oldest go on to files."""

    def __init__(self, limit_bytes: int, files: RowFiles, memory: HostMemory | None = None) -> None:
        """`memory`: where vectors are copied; None: they are here as they come."""
        self._limit_bytes = limit_bytes
        self._files = files
        self._memory = memory
        self._parts: dict[RowPart, Tensor] = {}  # the first to have come first
        self._size_bytes = 0
        self.count = Counter[Part]()  # how many rows have a part here

    def __contains__(self, place: object) -> bool:
        return place in self._parts

    def put(self, place: RowPart, vector: Tensor) -> None:
        """Takes a part in. Raises RowStorageFull, and has not taken it, if there is no room."""
        if vector.nbytes > self._limit_bytes:
            self._files.put(place, vector)
            return
        while not self.has_room(vector.nbytes):
            oldest, idle = next(iter(self._parts.items()))
            self._files.put(oldest, idle)
            self._forget(oldest)
        if self._memory:
            self.reserve(place, len(vector)).copy_(vector)
        else:
            self._add(place, vector)

    def has_room(self, size_bytes: int) -> bool:
        """Whether a part could come and none would have to go on."""
        return self._size_bytes + size_bytes <= self._limit_bytes

    def reserve(self, place: RowPart, size: int) -> Tensor:  # [size], of any content
        """Room, which there is, for a part that is copied there."""
        if self._memory:
            vector = self._memory.take(size, self._limit_bytes - self._size_bytes)
        else:
            vector = zero_vector(size, torch.device("cpu"))
        self._add(place, vector)
        return vector

    def get(self, place: RowPart, size: int) -> Tensor:  # [size]
        """A part, which stays here too."""
        return self._parts[place] if place in self._parts else self._files.get(place, size)

    def drop(self, place: RowPart) -> None:
        """Forgets a part, if it is here or in a file."""
        self._forget(place)
        self._files.drop(place)

    def _add(self, place: RowPart, vector: Tensor) -> None:
        self._parts[place] = vector
        self._size_bytes += vector.nbytes
        self.count[place[1]] += 1

    def _forget(self, place: RowPart) -> None:
        if (vector := self._parts.pop(place, None)) is not None:
            self._size_bytes -= vector.nbytes
            self.count[place[1]] -= 1
            if self._memory:
                self._memory.give_back(vector)

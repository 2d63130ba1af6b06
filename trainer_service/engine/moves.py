"""Moves of parts of rows between the device and what is below it, beside what computes: to and from
files in a thread, to and from host memory on a stream of the GPU's own.
"""

from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mint_core.fault_points import fault_point
from trainer_service.engine.host_rows import HostRows
from trainer_service.engine.row_files import RowFiles, RowPart


@dataclass(slots=True, eq=False)
class Leaving:
    """A part on its way from the device, which nobody uses meanwhile."""

    vector: Tensor | None  # [params]; None: it has left, and its memory is free


class Ending(Protocol):
    """What becomes of a move."""

    def cancel(self) -> bool:
        """Keeps it from beginning. Returns whether that came in time."""
        ...

    def done(self) -> bool: ...

    def result(self) -> Tensor | None:
        """Waits, for this move alone, and returns what came to the device. Raises why it failed."""
        ...


class Below(Protocol):
    """Where parts lie that are not on the device. Moves are done in the order in which they were
    begun; all else is for the engine's thread.
    """

    exact: bool  # whether a part's place on the device goes to one of its size alone

    @property
    def empty(self) -> bool:
        """Whether nothing could be fetched."""
        ...

    def has(self, place: RowPart) -> bool: ...

    def has_room(self, size_bytes: int) -> bool:
        """Whether a part may leave the device."""
        ...

    def begin_leave(self, place: RowPart, leaving: Leaving) -> Ending: ...

    def left(self, place: RowPart) -> None:
        """Takes note of a part that has left the device."""
        ...

    def begin_fetch(self, place: RowPart, size: int, into: Tensor | None) -> Ending:
        """Brings a part of so many numbers, into memory that is, or is becoming, free."""
        ...

    def drop(self, place: RowPart) -> None:
        """Forgets a part that has been fetched."""
        ...

    def resume(self) -> None:
        """Says that nothing is under way. After a failure nothing was begun until now."""
        ...


class FileMoves:
    """Device memory is the host's, and files are below it."""

    exact = False

    def __init__(self, files: RowFiles) -> None:
        self._files = files
        self._thread = ThreadPoolExecutor(1, "rows")
        self._thread.submit(int)  # it is there from now on: what is begun is done, or fails
        self._failed = False  # room that was counted on did not become free

    @property
    def empty(self) -> bool:
        return not self._files.count.total()

    def has(self, place: RowPart) -> bool:
        return place in self._files

    def has_room(self, size_bytes: int) -> bool:
        return True

    def begin_leave(self, place: RowPart, leaving: Leaving) -> "Future[None]":
        return self._thread.submit(self._write, place, leaving)

    def left(self, place: RowPart) -> None:
        self._files.note(place)

    def begin_fetch(self, place: RowPart, size: int, into: Tensor | None) -> "Future[Tensor]":
        return self._thread.submit(self._read, place, size)

    def drop(self, place: RowPart) -> None:
        self._files.drop(place)

    def resume(self) -> None:
        self._failed = False

    def _write(self, place: RowPart, leaving: Leaving) -> None:
        if self._failed:
            raise CancelledError
        assert leaving.vector is not None
        try:
            self._files.write(place, leaving.vector)
        except BaseException:
            self._failed = True
            raise
        leaving.vector = None  # before the next is read

    def _read(self, place: RowPart, size: int) -> Tensor:
        if self._failed:
            raise CancelledError
        fault_point("rows:fetching")
        vector = self._files.get(place, size)
        self._files.unlink(place)  # which takes long, and what has come is always taken in
        return vector


class Copied(Protocol):
    """The end of a copy, as torch.cuda.Event."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Copies(Protocol):
    """Copies beside what computes, one after the other."""

    def begin(self, target: Tensor, source: Tensor) -> Copied:
        """Of what there is when the device has done what it was given before."""
        ...


class SideStream:
    """Of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def begin(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return event


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """It holds what is copied until somebody has waited for it: nothing else takes its memory."""

    vectors: tuple[Tensor, Tensor]  # target, source
    end: Copied

    def cancel(self) -> bool:
        return False

    def done(self) -> bool:
        return self.end.query()

    def result(self) -> Tensor:
        self.end.synchronize()
        return self.vectors[0]


class HostMoves:
    """Host memory is below a GPU's. What is in files, or would have to go there, stays."""

    exact = True

    def __init__(self, host: HostRows, copies: Copies, device: torch.device) -> None:
        self._host = host
        self._copies = copies
        self._device = device

    @property
    def empty(self) -> bool:
        return not self._host.count.total()

    def has(self, place: RowPart) -> bool:
        return place in self._host

    def has_room(self, size_bytes: int) -> bool:
        return self._host.has_room(size_bytes)

    def begin_leave(self, place: RowPart, leaving: Leaving) -> Ending:
        assert leaving.vector is not None
        return self._begin(self._host.reserve(place, len(leaving.vector)), leaving.vector)

    def left(self, place: RowPart) -> None:
        pass

    def begin_fetch(self, place: RowPart, size: int, into: Tensor | None) -> Ending:
        target = torch.empty(size, device=self._device) if into is None else into
        return self._begin(target, self._host.get(place, size))

    def drop(self, place: RowPart) -> None:
        self._host.drop(place)

    def resume(self) -> None:
        pass

    def _begin(self, target: Tensor, source: Tensor) -> Ending:
        return _Copy((target, source), self._copies.begin(target, source))

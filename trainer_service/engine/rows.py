"""The rows of all runs, and where each part of them is: on the device, in host memory, in a file.

What is asked for comes to the device, part by part; what has not been used for longest makes room.
So moments, which steps alone need, are the first to go between two steps. Moving a part changes
none of its bits. On a CPU device and host memory are the same, and parts go from one straight to
the disk.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mint_core.errors import MintError
from mint_core.lora.bank import AdapterRow, Part, zero_vector
from mint_core.model.base_files import free_bytes
from trainer_service.engine.row_files import RowFiles, RowPart
from trainer_service.jobs import RowCounts

DEVICE_SHARE = 0.3  # of what is free on the device after loading
HOST_SHARE = 0.5  # of free host memory, beside a GPU


@dataclass(slots=True, eq=False)
class TrainedRow:
    """A run's row and how many steps it has taken."""

    row: AdapterRow
    step: int = 0
    gradient_pending: bool = False  # otherwise the gradient is zero
    weight_digest: int = 0  # of the weights as they are; 0: not taken
    # A weight, and a moment or root of a second one, than which none is larger; None: not known.
    largest: tuple[float, float] | None = None
    moved: set[Part] = field(default_factory=set)  # parts that are kept elsewhere

    @property
    def worth_keeping(self) -> frozenset[Part]:
        """The parts that a run cannot do without, wherever they are."""
        parts = self.moved.union(self.row.held)
        return frozenset(parts if self.gradient_pending else parts - {Part.GRADIENT})

    def clear_gradient(self) -> None:
        """Makes the gradient zero, wherever the row is."""
        self.gradient_pending = False
        if Part.GRADIENT in self.row.held:
            self.row.part(Part.GRADIENT).zero_()

    @property
    def held_bytes(self) -> int:
        """Memory of the row on the device."""
        return len(self.row.held) * self.row.bank.part_bytes


Want = tuple[str, frozenset[Part]]  # a run's row, and the parts that the work at hand uses


class HostRows:
    """Parts of rows in host memory, up to a limit; the oldest go on to files."""

    def __init__(self, limit_bytes: int, files: RowFiles) -> None:
        self._limit_bytes = limit_bytes
        self._files = files
        self._parts: dict[RowPart, Tensor] = {}  # the first to have come first
        self._size_bytes = 0
        self.count = Counter[Part]()  # how many rows have a part here

    def put(self, place: RowPart, vector: Tensor) -> None:
        """Takes a part in. Raises RowStorageFull, and has not taken it, if there is no room."""
        if vector.nbytes > self._limit_bytes:
            self._files.put(place, vector)
            return
        while self._size_bytes + vector.nbytes > self._limit_bytes:
            oldest, idle = next(iter(self._parts.items()))
            self._files.put(oldest, idle)
            self._forget(oldest)
        self._parts[place] = _in_host_memory(vector)
        self._size_bytes += vector.nbytes
        self.count[place[1]] += 1

    def get(self, place: RowPart, size: int) -> Tensor:  # [size]
        """A part, which stays here too."""
        return self._parts[place] if place in self._parts else self._files.get(place, size)

    def drop(self, place: RowPart) -> None:
        """Forgets a part, if it is here or in a file."""
        self._forget(place)
        self._files.drop(place)

    def _forget(self, place: RowPart) -> None:
        if (vector := self._parts.pop(place, None)) is not None:
            self._size_bytes -= vector.nbytes
            self.count[place[1]] -= 1


class Rows:
    """By `training_run_id`. Spans of `page_in` say which are on the device."""

    def __init__(
        self,
        limit_bytes: int,
        *,
        host_limit_bytes: int,
        files: RowFiles,
        progress: Callable[[], None],  # called after each move: disks are slow
    ) -> None:
        self._limit_bytes = limit_bytes
        self._progress = progress
        self._files = files
        self._host = HostRows(host_limit_bytes, files)
        self._rows: dict[str, TrainedRow] = {}
        self._used: dict[RowPart, None] = {}  # on the device, the least recently used first

    def __getitem__(self, training_run_id: str) -> TrainedRow:
        """The row, wherever it is."""
        return self._rows[training_run_id]

    @contextmanager
    def adding(self, training_run_id: str, row: AdapterRow) -> Iterator[TrainedRow]:
        """Takes in a row that is to be filled meanwhile, and forgets it if that fails. Raises
        RowStorageFull.
        """
        self._rows[training_run_id] = trained = TrainedRow(row)
        try:
            self.here(training_run_id, Part.WEIGHTS)
            yield trained
        except Exception:
            self.remove(training_run_id)
            raise

    def remove(self, training_run_id: str) -> None:
        """Forgets a row, if it is there."""
        trained = self._rows.pop(training_run_id, None)
        if trained is not None:
            trained.row.leave()
            for part in Part:
                self._used.pop((training_run_id, part), None)
                self._host.drop((training_run_id, part))

    def here(self, training_run_id: str, *parts: Part) -> TrainedRow:
        """The row with those parts on the device. Raises if they cannot come."""
        self._bring(training_run_id, frozenset(parts), {(training_run_id, part) for part in parts})
        return self._rows[training_run_id]

    def free(self, training_run_id: str, part: Part) -> None:
        """Makes a part zero, wherever it is, and gives its memory back."""
        trained = self._rows[training_run_id]
        trained.moved.discard(part)
        trained.row.free(part)
        self._host.drop((training_run_id, part))

    def kept(self, training_run_id: str) -> dict[Part, Tensor]:
        """What a run cannot do without, each part wherever it is. Raises if one cannot be read."""
        trained = self._rows[training_run_id]
        size = trained.row.bank.row_size
        return {
            part: self._host.get((training_run_id, part), size)
            if part in trained.moved
            else trained.row.part(part)
            for part in trained.worth_keeping
        }

    def page_in(self, wants: Sequence[Want]) -> Iterator[tuple[slice, dict[str, MintError]]]:
        """Brings rows to the device, as many at a time as it holds; what a span of wants uses stays
        until the next is asked for. A row that cannot come is refused alone: why, by run.
        """
        start = 0
        while start < len(wants):
            stop = self._fitting(wants, start)
            refused: dict[str, MintError] = {}
            keep = {(run, part) for run, parts in wants[start:stop] for part in parts}
            for run, parts in wants[start:stop]:
                try:
                    self._bring(run, parts, keep)
                except MintError as error:
                    refused[run] = error
            yield slice(start, stop), refused
            start = stop

    def counts(self) -> RowCounts:
        """A row is where its weights are."""
        host, disk = self._host.count[Part.WEIGHTS], self._files.count[Part.WEIGHTS]
        return RowCounts(device=len(self._rows) - host - disk, host=host, disk=disk)

    def _fitting(self, wants: Sequence[Want], start: int) -> int:
        """The end of the longest span that fits on the device: at least one want."""
        places: set[RowPart] = set()
        size_bytes = 0
        for stop, (run, wanted) in enumerate(wants[start:], start):
            more = {(run, part) for part in wanted} - places
            size_bytes += len(more) * self._rows[run].row.bank.part_bytes
            places |= more
            if stop > start and size_bytes > self._limit_bytes:
                return stop
        return len(wants)

    def _bring(self, run: str, wanted: frozenset[Part], keep: AbstractSet[RowPart]) -> None:
        trained = self._rows[run]
        # The most recently used from now on; weights, which all work needs, the last to go.
        row, places = trained.row, [(run, part) for part in reversed(Part) if part in wanted]
        for place in places:
            self._used.pop(place, None)
            self._used[place] = None
        if lacking := [place for place in places if place[1] not in row.held]:
            self._make_room(len(lacking) * row.bank.part_bytes, keep)
        for place in lacking:
            part = place[1]
            if part not in trained.worth_keeping:  # it is zero, perhaps since it was moved
                self.free(run, part)
            if part in trained.moved:
                row.come_back({part: self._host.get(place, row.bank.row_size)})
                trained.moved.remove(part)
                self._host.drop(place)
                self._progress()
            row.part(part)  # takes the memory that was made free for it

    def _make_room(self, size_bytes: int, keep: AbstractSet[RowPart]) -> None:
        """Moves parts away until so much is free, or nothing is left to move."""
        taken_bytes = sum(trained.held_bytes for trained in self._rows.values())
        for run, part in list(self._used):
            if taken_bytes + size_bytes <= self._limit_bytes:
                return
            trained = self._rows[run]
            if (run, part) not in keep and part in trained.row.held:
                self._move_away(run, trained, part)
                taken_bytes -= trained.row.bank.part_bytes

    def _move_away(self, run: str, trained: TrainedRow, part: Part) -> None:
        if part in trained.worth_keeping:
            self._host.put((run, part), trained.row.part(part))
            trained.moved.add(part)
            trained.row.leave(part)
            self._progress()
        else:
            self.free(run, part)
        del self._used[run, part]


def _in_host_memory(vector: Tensor) -> Tensor:
    if vector.device.type == "cpu":
        return vector
    return zero_vector(len(vector), torch.device("cpu")).copy_(vector)


def device_limit_bytes(device: torch.device, own_share: float = 0.0) -> int:
    """Memory at hand for rows, now that the base model is loaded."""
    return int(DEVICE_SHARE * free_bytes(device, own_share))


def host_limit_bytes(device: torch.device) -> int:
    """Host memory at hand for rows of idle runs; none where the device's memory is the host's."""
    return 0 if device.type == "cpu" else int(HOST_SHARE * free_bytes(torch.device("cpu")))

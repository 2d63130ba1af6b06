"""The rows of all runs, and where each of them is: on the device, in host memory, or in a file.

What is asked for comes to the device; what has not been used for longest makes room. Moving a row
changes none of its bits. On a CPU device and host memory are the same, and rows go from one
straight to the disk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_core.errors import MintError
from mint_core.lora.bank import AdapterRow, Part, zero_vector
from mint_core.model.base_files import free_bytes
from trainer_service.engine.row_files import RowFiles
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
    moved: tuple[Part, ...] = ()  # the parts that are kept elsewhere while the row is away

    def worth_keeping(self) -> dict[Part, Tensor]:
        """The parts here that a run cannot do without."""
        held = dict(self.row.held)
        if not self.gradient_pending:
            held.pop(Part.GRADIENT, None)
        return held

    def clear_gradient(self) -> None:
        """Makes the gradient zero, wherever the row is."""
        self.gradient_pending = False
        if Part.GRADIENT in self.row.held:
            self.row.part(Part.GRADIENT).zero_()

    def size_bytes(self, wanted: AbstractSet[Part] = frozenset()) -> int:
        """Memory of the row on the device once it is there with the parts wanted."""
        return len({*self.row.held, *self.moved, *wanted}) * self.row.bank.part_bytes


Want = tuple[str, frozenset[Part]]  # a run's row, and the parts that the work at hand changes


class HostRows:
    """Rows in host memory, up to a limit; the oldest go on to files."""

    def __init__(self, limit_bytes: int, files: RowFiles) -> None:
        self._limit_bytes = limit_bytes
        self._files = files
        self._rows: dict[str, dict[Part, Tensor]] = {}  # the first to have come first
        self._size_bytes = 0

    def __len__(self) -> int:
        """How many rows are in memory."""
        return len(self._rows)

    def put(self, name: str, parts: Mapping[Part, Tensor]) -> None:
        """Takes a row in. Raises RowStorageFull, and has not taken it, if there is no room."""
        size_bytes = _size_bytes(parts)
        if size_bytes > self._limit_bytes:
            self._files.put(name, parts)
            return
        while self._size_bytes + size_bytes > self._limit_bytes:
            oldest, idle = next(iter(self._rows.items()))
            self._files.put(oldest, idle)
            self._forget(oldest)
        self._rows[name] = {part: _in_host_memory(vector) for part, vector in parts.items()}
        self._size_bytes += size_bytes

    def get(self, name: str, size: int) -> dict[Part, Tensor]:
        """The parts of a row, vectors [size], which stays here too."""
        return self._rows[name].copy() if name in self._rows else self._files.get(name, size)

    def drop(self, name: str) -> None:
        """Forgets a row, if it is here or in a file."""
        self._forget(name)
        self._files.drop(name)

    def _forget(self, name: str) -> None:
        self._size_bytes -= _size_bytes(self._rows.pop(name, {}))


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
        self._rows: dict[str, TrainedRow] = {}  # the least recently used first

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
            self._host.drop(training_run_id)

    def here(self, training_run_id: str, *parts: Part) -> TrainedRow:
        """The row on the device, with room for the parts. Raises if it cannot come."""
        self._bring(training_run_id, frozenset(parts), {training_run_id})
        return self._rows[training_run_id]

    def page_in(self, wants: Sequence[Want]) -> Iterator[tuple[slice, dict[str, MintError]]]:
        """Brings rows to the device, as many at a time as it holds; those of a span of wants stay
        until the next is asked for. A row that cannot come is refused alone: why, by run.
        """
        start = 0
        while start < len(wants):
            stop = self._fitting(wants, start)
            refused: dict[str, MintError] = {}
            keep = {run for run, _ in wants[start:stop]}
            for run, parts in wants[start:stop]:
                try:
                    self._bring(run, parts, keep)
                except MintError as error:
                    refused[run] = error
            yield slice(start, stop), refused
            start = stop

    def counts(self) -> RowCounts:
        host, disk = len(self._host), len(self._files)
        return RowCounts(device=len(self._rows) - host - disk, host=host, disk=disk)

    def _fitting(self, wants: Sequence[Want], start: int) -> int:
        """The end of the longest span that fits on the device: at least one want."""
        sizes: dict[str, int] = {}
        parts: dict[str, frozenset[Part]] = {}
        for stop, (run, wanted) in enumerate(wants[start:], start):
            parts[run] = parts.get(run, frozenset()) | wanted
            sizes[run] = self._rows[run].size_bytes(parts[run])
            if stop > start and sum(sizes.values()) > self._limit_bytes:
                return stop
        return len(wants)

    def _bring(self, run: str, wanted: frozenset[Part], keep: AbstractSet[str]) -> None:
        trained = self._rows[run] = self._rows.pop(run)  # the most recently used from now on
        more_bytes = trained.size_bytes(wanted) - _size_bytes(trained.row.held)
        if more_bytes:
            self._make_room(more_bytes, keep)
        if trained.moved:
            parts = self._host.get(run, trained.row.bank.row_size)
            if not trained.gradient_pending:
                parts.pop(Part.GRADIENT, None)  # it was cleared meanwhile
            trained.row.come_back(parts)
            trained.moved = ()
            self._host.drop(run)
            self._progress()
        for part in wanted:
            trained.row.part(part)  # takes the memory that was made free for it

    def _make_room(self, size_bytes: int, keep: AbstractSet[str]) -> None:
        """Moves idle rows away until so much is free, or nothing is left to move."""
        taken_bytes = sum(_size_bytes(trained.row.held) for trained in self._rows.values())
        for run, trained in self._rows.items():
            if taken_bytes + size_bytes <= self._limit_bytes:
                return
            if run not in keep and not trained.moved:
                taken_bytes -= _size_bytes(trained.row.held)
                self._move_away(run, trained)

    def _move_away(self, run: str, trained: TrainedRow) -> None:
        parts = trained.worth_keeping()
        self._host.put(run, parts)
        trained.moved = tuple(parts)
        trained.row.leave()
        self._progress()


def _in_host_memory(vector: Tensor) -> Tensor:
    if vector.device.type == "cpu":
        return vector
    return zero_vector(len(vector), torch.device("cpu")).copy_(vector)


def _size_bytes(parts: Mapping[Part, Tensor]) -> int:
    return sum(vector.nbytes for vector in parts.values())


def device_limit_bytes(device: torch.device, own_share: float = 0.0) -> int:
    """Memory at hand for rows, now that the base model is loaded."""
    return int(DEVICE_SHARE * free_bytes(device, own_share))


def host_limit_bytes(device: torch.device) -> int:
    """Host memory at hand for rows of idle runs; none where the device's memory is the host's."""
    return 0 if device.type == "cpu" else int(HOST_SHARE * free_bytes(torch.device("cpu")))

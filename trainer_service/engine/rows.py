"""The rows of all runs, and where each part of them is: on the device, in host memory, in a file.

What is asked for comes to the device, part by part; what has not been used for longest makes room.
So moments, which steps alone need, are the first to go between two steps. Moving a part changes
none of its bits. On a CPU device and host memory are the same, and parts go from one straight to
the disk.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch
from torch import Tensor

from mint_core.errors import MintError
from mint_core.lora.bank import AdapterRow, Part
from mint_core.model.base_files import free_bytes
from trainer_service.engine.ahead import Ahead
from trainer_service.engine.host_rows import HostRows, host_memory
from trainer_service.engine.moves import Below, FileMoves, HostMoves, SideStream
from trainer_service.engine.row_files import RowFiles, RowPart
from trainer_service.engine.trained_row import DeviceRows, TrainedRow, Want
from trainer_service.jobs import RowCounts

DEVICE_SHARE = 0.3  # of what is free on the device after loading
HOST_SHARE = 0.5  # of free host memory, beside a GPU


class Rows:
    """By `training_run_id`. Spans of `page_in` say which are on the device."""

    def __init__(
        self,
        limit_bytes: int,
        *,
        host_limit_bytes: int,
        files: RowFiles,
        progress: Callable[[], None],  # called after each move: disks are slow
        device: torch.device,
    ) -> None:
        self._progress = progress
        self._files = files
        self._host = HostRows(host_limit_bytes, files, host_memory(device))
        self._device = DeviceRows(limit_bytes)
        self._rows = self._device.rows  # by id
        below: Below | None = None if host_limit_bytes else FileMoves(files)
        if device.type == "cuda":
            below = HostMoves(self._host, SideStream(device), device)
        self.ahead = Ahead(self._device, below)

    def __getitem__(self, training_run_id: str) -> TrainedRow:
        """The row, wherever it is."""
        self.ahead.settle(training_run_id)
        return self._rows[training_run_id]

    def at_hand(self, training_run_id: str) -> TrainedRow:
        """A row that was paged in, of which what was is used alone: the rest may be under way."""
        return self._rows[training_run_id]

    @contextmanager
    def adding(self, training_run_id: str, row: AdapterRow) -> Iterator[TrainedRow]:
        """Takes in a row that is to be filled meanwhile, and forgets it if that fails. Raises
        RowStorageFull.
        """
        self.ahead.settle(training_run_id)
        self._rows[training_run_id] = trained = TrainedRow(row)
        try:
            self.here(training_run_id, Part.WEIGHTS)
            yield trained
        except Exception:
            self.remove(training_run_id)
            raise

    def remove(self, training_run_id: str) -> None:
        """Forgets a row, if it is there."""
        self.ahead.settle(training_run_id)
        if training_run_id in self._rows:
            self._device.remove(training_run_id)
            for part in Part:
                self.ahead.note_end((training_run_id, part))
                self._host.drop((training_run_id, part))

    def here(self, training_run_id: str, *parts: Part) -> TrainedRow:
        """The row with those parts on the device. Raises if they cannot come."""
        self._bring(training_run_id, frozenset(parts), {(training_run_id, part) for part in parts})
        return self._rows[training_run_id]

    def free(self, training_run_id: str, part: Part) -> None:
        """Makes a part zero, wherever it is, and gives its memory back."""
        self.ahead.settle(training_run_id)
        self._free((training_run_id, part))

    def kept(self, training_run_id: str) -> dict[Part, Tensor]:
        """What a run cannot do without, each part wherever it is. Raises if one cannot be read."""
        trained = self[training_run_id]
        size = trained.row.bank.row_size
        return {
            part: self._host.get((training_run_id, part), size)
            if part in trained.moved
            else trained.row.part(part)
            for part in trained.worth_keeping
        }

    def page_in(
        self, wants: Sequence[Want], coming: Sequence[Want] = ()
    ) -> Iterator[tuple[slice, dict[str, MintError]]]:
        """Brings rows to the device, as many at a time as it holds; what a span of wants uses stays
        until the next is asked for. A row that cannot come is refused alone: why, by run. What is
        `coming` is brought meanwhile, where it can.
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
            if not refused:  # else there is no room, or no disk
                self.ahead.expect([*wants[stop:], *coming], keep)
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
            if stop > start and size_bytes > self._device.limit_bytes:
                return stop
        return len(wants)

    def _bring(self, run: str, wanted: frozenset[Part], keep: AbstractSet[RowPart]) -> None:
        self.ahead.settle(run)
        trained = self._rows[run]
        # The most recently used from now on; weights, which all work needs, the last to go.
        row, places = trained.row, [(run, part) for part in reversed(Part) if part in wanted]
        for place in places:
            self._device.use(place)
            self.ahead.note_use(place)
        if lacking := [place for place in places if place[1] not in row.held]:
            self._make_room(len(lacking) * row.bank.part_bytes, keep)
        for place in lacking:
            part = place[1]
            if part not in trained.worth_keeping:  # it is zero, perhaps since it was moved
                self._free(place)
            if part in trained.moved:
                self._device.put(place, self._host.get(place, row.bank.row_size))
                self._host.drop(place)
                self.ahead.note_asked()
                self._progress()
            row.part(part)  # takes the memory that was made free for it

    def _make_room(self, size_bytes: int, keep: AbstractSet[RowPart]) -> None:
        """Moves parts away until so much is free, or nothing is left to move."""
        if self.ahead.has_room(size_bytes):
            return
        self.ahead.stop()
        taken_bytes = self._device.held_bytes
        for place in self._device.idle(keep):
            if taken_bytes + size_bytes <= self._device.limit_bytes:
                return
            taken_bytes -= self._device.size_bytes(place)
            self._move_away(place)

    def _move_away(self, place: RowPart) -> None:
        self.ahead.note_end(place)
        if place[1] not in self._rows[place[0]].worth_keeping:
            self._free(place)
            return
        self._host.put(place, self._device.vector(place))
        self._rows[place[0]].moved.add(place[1])
        self._device.leave(place)
        self._progress()

    def _free(self, place: RowPart) -> None:
        self.ahead.note_end(place)
        self._device.free(place)
        self._host.drop(place)


def device_limit_bytes(device: torch.device, own_share: float = 0.0) -> int:
    """Memory at hand for rows, now that the base model is loaded."""
    return int(DEVICE_SHARE * free_bytes(device, own_share))


def host_limit_bytes(device: torch.device) -> int:
    """Host memory at hand for rows of idle runs; none where the device's memory is the host's."""
    return 0 if device.type == "cpu" else int(HOST_SHARE * free_bytes(torch.device("cpu")))

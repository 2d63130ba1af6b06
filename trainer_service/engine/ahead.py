"""Rows that are brought to the device before they are asked for, beside what computes.

What comes next is a guess, and nothing but speed hangs on it: before anybody sees a row, what is
under way of it has ended, so it is what it was. A part that leaves has memory until it has left,
and one that comes from then on, so together they never have more than there is.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_core.errors import MintError
from mint_core.lora.bank import Part
from trainer_service.engine.moves import Below, Ending, Leaving
from trainer_service.engine.row_files import RowPart
from trainer_service.engine.trained_row import DeviceRows, Want

logger = logging.getLogger(__name__)

# How parts came that were not on the device: before they were asked for; then, but on their way;
# when they were asked for; or in vain.
EARLY, LATE, ASKED, UNUSED = "early", "late", "asked", "unused"


@dataclass(frozen=True, slots=True, eq=False)
class _Move:
    size_bytes: int
    ending: Ending
    leaving: Leaving | None  # None: it comes

    @property
    def more_bytes(self) -> int:
        """By how much it changes what rows take on the device."""
        return -self.size_bytes if self.leaving else self.size_bytes


class Ahead:
    """All methods are for the engine's thread."""

    def __init__(self, device: DeviceRows, below: Below | None) -> None:
        """`below` None: nothing is brought ahead."""
        self._device = device
        self._below = below
        self._under_way: dict[RowPart, _Move] = {}  # in the order in which they are done
        self._brought: dict[RowPart, str] = {}  # how they came; they wait for their use
        self.counts = Counter[str]()

    def expect(self, wants: Sequence[Want], keep: AbstractSet[RowPart]) -> None:
        """Begins to bring what is probably wanted next, the nearest first, as far as there is room
        without what is in `keep` and what is wanted before it. Rows that are not here are left out.
        """
        if self._below is None or self._below.empty:
            return
        self._collect()
        wanted = [(run, part) for run, parts in wants for part in Part if part in parts]
        wanted = [place for place in dict.fromkeys(wanted) if place[0] in self._device.rows]
        lacking = [place for place in wanted if self._lacks(place)]
        # Rows of which nothing is away get the room for what is zero when they use it.
        away = {run for run, part in lacking if self._below.has((run, part))}
        if lacking := [place for place in lacking if place[0] in away]:
            with suppress(MemoryError, OSError, torch.OutOfMemoryError):
                self._begin(lacking, wanted, keep)

    def _lacks(self, place: RowPart) -> bool:
        held = self._device.rows[place[0]].row.held
        return place[1] not in held and place not in self._under_way

    def _begin(
        self, lacking: Sequence[RowPart], wanted: Sequence[RowPart], keep: AbstractSet[RowPart]
    ) -> None:
        assert self._below is not None
        turns = {place: turn for turn, place in enumerate(wanted)}
        # What nobody wants leaves first, then what is wanted last.
        idle = [(turns.get(place, len(turns)), place) for place in self._device.idle(keep)]
        idle.sort(key=lambda each: -each[0])
        free_bytes = self._device.limit_bytes - self._device.held_bytes
        free_bytes -= sum(move.size_bytes for move in self._under_way.values() if not move.leaving)
        for place in lacking:
            trained, size_bytes = self._device.rows[place[0]], self._device.size_bytes(place)
            into = None
            while free_bytes < size_bytes:
                if (left := self._make_room(idle, size_bytes, turns[place])) is None:
                    return
                free_bytes += left[0]
                into = left[1]
            free_bytes -= size_bytes  # also of a part that is zero: it need not be fetched
            if place[1] in trained.worth_keeping and self._below.has(place):
                ending = self._below.begin_fetch(place, trained.row.bank.row_size, into)
                self._under_way[place] = _Move(size_bytes, ending, None)

    def settle(self, training_run_id: str) -> None:
        """Ends what is under way of a row: what has not begun will not be."""
        if not self._under_way:
            return
        for place in [(training_run_id, part) for part in Part]:
            if (move := self._under_way.get(place)) is None:
                continue
            if move.leaving:  # what comes behind it counts on its room
                self.stop()
                return
            move.ending.cancel()
            self._end(place)

    def stop(self) -> None:
        """Ends all that is under way."""
        for move in reversed(self._under_way.values()):
            move.ending.cancel()
        while self._under_way:
            self._end(next(iter(self._under_way)))
        if self._below is not None:
            self._below.resume()

    def has_room(self, size_bytes: int) -> bool:
        """Whether that much more fits at once, and whatever is under way as well."""
        self._collect()
        moves = self._under_way.values()
        most = now = self._device.held_bytes + sum(m.size_bytes for m in moves if m.leaving)
        for move in moves:
            now += move.more_bytes
            most = max(most, now)
        return most + size_bytes <= self._device.limit_bytes

    def note_use(self, place: RowPart) -> None:
        """Counts a part that is used, and was brought."""
        if self._brought and (how := self._brought.pop(place, None)):
            self.counts[how] += 1

    def note_asked(self) -> None:
        """Counts a part that comes when it is asked for."""
        self.counts[ASKED] += 1

    def note_end(self, place: RowPart) -> None:
        """Counts a part that was brought in vain, if it was."""
        if self._brought.pop(place, None):
            self.counts[UNUSED] += 1

    def _make_room(
        self, idle: list[tuple[int, RowPart]], size_bytes: int, turn: int
    ) -> tuple[int, Tensor | None] | None:
        """Has an idle part leave that is wanted later. Returns how many bytes that gives, and where
        they are if that counts; None if none may leave.
        """
        below = self._below
        assert below is not None
        for each in idle:
            if each[0] <= turn:
                return None
            place = each[1]
            own_bytes = self._device.size_bytes(place)
            if below.exact and own_bytes != size_bytes:
                continue
            idle.remove(each)
            self.note_end(place)
            if place[1] not in self._device.rows[place[0]].worth_keeping:
                self._device.free(place)
                return own_bytes, None
            if not below.has_room(own_bytes):
                return None
            leaving = Leaving(self._device.vector(place))
            self._under_way[place] = _Move(own_bytes, below.begin_leave(place, leaving), leaving)
            self._device.leave(place)
            return own_bytes, leaving.vector if below.exact else None
        return None

    def _collect(self) -> None:
        """Ends what is done."""
        while self._under_way:
            place, move = next(iter(self._under_way.items()))
            if not move.ending.done():
                return
            self._end(place)

    def _end(self, place: RowPart) -> None:
        """Waits for a move, and takes note of what has come of it."""
        assert self._below is not None
        move = self._under_way.pop(place)
        how = EARLY if move.ending.done() else LATE
        try:
            vector = move.ending.result()
        except (CancelledError, MintError, MemoryError, OSError) as error:
            if not isinstance(error, CancelledError):  # who asks for the part is told
                logger.info("%s of %s was not moved ahead: %r", place[1], place[0], error)
            if move.leaving:
                assert move.leaving.vector is not None
                self._device.put(place, move.leaving.vector)
                move.leaving.vector = None  # what was cancelled is held until its turn
                self.stop()  # what comes behind it counts on its room
        else:
            if move.leaving:
                self._device.rows[place[0]].moved.add(place[1])
                self._below.left(place)
            else:
                assert vector is not None
                self._device.put(place, vector)
                self._below.drop(place)
                self._brought[place] = how

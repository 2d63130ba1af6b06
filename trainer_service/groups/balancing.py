"""When a run moves since loads differ: the fullest groups give one to the emptiest of their kind,
one at a time, if that has been so for a while and the move is worth what it costs. One that comes
back to work after a long rest moves at once: its row is on disk, and more work is to be expected.
"""

from dataclasses import dataclass

from trainer_service.groups.placement import Load, Placed, Placement

PATIENCE_S = 20.0  # for which a group has more than another before it gives
LEAST_GAP = 1.0  # between two loads, in runs with work
GAP_SHARE = 0.3  # of the larger load
MOVE_S = 1.0  # of a pause, without the row
DISK_BYTES_PER_S = 500e6  # a row is written, and read
REST = 100  # how many times its pause a run stays where it is
LEAST_LOAD = 0.1  # of a run that is worth a move
MOST_PART = 0.55  # of a gap, for which its load may stand


@dataclass(frozen=True, slots=True)
class Move:
    run: str
    source: str
    target: str


def pause_s(row_bytes: int) -> float:
    """About how long a run's calls wait for its move."""
    return MOVE_S + 2 * row_bytes / DISK_BYTES_PER_S


class Balancing:
    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._full_since_s: dict[str, float] = {}
        self._moving: set[str] = set()  # groups that give or take a run

    def moves(self, now_s: float) -> list[Move]:
        """What should move now. Called every second or so; each move is to be told as `ended`."""
        by_kind: dict[str, list[Load]] = {}
        for load in self._placement.opened():
            by_kind.setdefault(load.kind, []).append(load)
        found = self._moves_of_returned(now_s)
        full: dict[str, float] = {}
        for loads in by_kind.values():
            loads.sort(key=lambda load: load.average.at(now_s))
            for source, target in zip(reversed(loads), loads[: len(loads) // 2], strict=False):
                gap = source.average.at(now_s) - target.average.at(now_s)
                if gap < max(LEAST_GAP, GAP_SHARE * source.average.at(now_s)):
                    break
                since_s = full[source.name] = self._full_since_s.get(source.name, now_s)
                if now_s - since_s < PATIENCE_S or {source.name, target.name} & self._moving:
                    continue
                if placed := _worth_moving(source, gap, now_s):
                    found.append(self._begin(placed.name, source, target))
        self._full_since_s = full
        return found

    def _moves_of_returned(self, now_s: float) -> list[Move]:
        returned, self._placement.returned = self._placement.returned, []
        found = []
        for run in returned:
            if (source := self._placement.homes.get(run)) is None:
                continue  # it is gone
            name = self._placement.choose(now_s, source.kind)
            if name is None or (target := self._placement.groups[name]).kind != source.kind:
                continue
            gap = source.average.at(now_s) - target.average.at(now_s)
            if gap >= LEAST_GAP and not {source.name, target.name} & self._moving:
                found.append(self._begin(run, source, target))
        return found

    def _begin(self, run: str, source: Load, target: Load) -> Move:
        self._moving |= {source.name, target.name}
        return Move(run, source.name, target.name)

    def ended(self, move: Move) -> None:
        self._moving -= {move.source, move.target}


def _worth_moving(source: Load, gap: float, now_s: float) -> Placed | None:
    """The run that brings two groups nearest to each other, of alike ones that of the smallest row;
    None if each would make a new gap, or has not been here for long.
    """
    best: tuple[float, int] | None = None
    found = None
    for placed in source.runs.values():
        load = placed.load.at(now_s)
        rested = now_s - placed.since_s >= REST * pause_s(placed.row_bytes)
        if not (LEAST_LOAD <= load <= MOST_PART * gap and rested):
            continue
        worth = (round(load, 1), -placed.row_bytes)
        if best is None or worth > best:
            best, found = worth, placed
    return found

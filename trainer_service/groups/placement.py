"""Which group a run goes to: the one that has the least to do of some that are drawn.

A group's load is how many of its runs have work, on average of late. Tokens alone would not tell a
group whose two runs fill it from one whose ten do. A run brings its own average along when it
moves; what is new counts as one that has work until it shows otherwise. Memory counts beside that,
as the part of a group's memory that its rows would take.

Nothing here waits or knows of engines: time is told. A decision looks at a few groups, whatever
their number.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

HALF_LIFE_S = 30.0  # after which what was counts half
DRAWN = 16  # groups that are looked at; with so many or fewer, all are
NEW_LOAD = 1.0  # of a run that has not shown any
IDLE_LOAD = 0.02  # of one that has had no work for about six half-lives


@dataclass(slots=True)
class Average:
    """Of what is 0 but for what is added, weighed by how long ago it was."""

    _value: float = 0.0
    _stamp_s: float = 0.0

    def at(self, now_s: float) -> float:
        if now_s > self._stamp_s:
            self._value *= 0.5 ** ((now_s - self._stamp_s) / HALF_LIFE_S)
            self._stamp_s = now_s
        return self._value

    def add(self, amount: float, now_s: float) -> None:
        self._value = max(0.0, self.at(now_s) + amount)


@dataclass(slots=True, eq=False)
class Placed:
    """A run in a group."""

    name: str
    row_bytes: int  # with gradient and moments
    load: Average = field(default_factory=Average)  # how much of the time it has work
    since_s: float = 0.0


@dataclass(slots=True, eq=False)
class Load:
    """What a group has."""

    name: str
    kind: str  # of its hardware: between alike ones a run moves without a bit's difference
    memory_bytes: int  # for rows; 0: not known
    runs: dict[str, Placed] = field(default_factory=dict)
    average: Average = field(default_factory=Average)  # how many of its runs have work
    row_bytes: int = 0
    open: bool = False  # whether it takes runs

    def pressure(self, now_s: float) -> float:
        memory = self.row_bytes / self.memory_bytes if self.memory_bytes else 0.0
        return self.average.at(now_s) + memory


class Placement:
    """All groups that there are, and those of them that take runs."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.groups: dict[str, Load] = {}
        self.homes: dict[str, Load] = {}  # by run
        self._open: dict[str, list[Load]] = {"": []}  # those that take runs; by kind, "": of all
        self.returned: list[str] = []  # runs seen at work after a long rest, since this was cleared

    def open(self, name: str, kind: str = "alike", memory_bytes: int = 0) -> None:
        """Has a group take runs."""
        self.close(name)
        load = self.groups.setdefault(name, Load(name, kind, memory_bytes))
        load.kind, load.memory_bytes, load.open = kind, memory_bytes, True
        self._open[""].append(load)
        self._open.setdefault(kind, []).append(load)

    def close(self, name: str) -> None:
        """Has a group take no more runs. Those that it has stay until they go."""
        if (load := self.groups.get(name)) and load.open:
            load.open = False
            self._open[""].remove(load)
            self._open[load.kind].remove(load)

    def remove(self, name: str) -> None:
        """Forgets a group, which has no runs any more."""
        self.close(name)
        self.groups.pop(name, None)

    def load(self, name: str, now_s: float) -> float:
        """How many runs of a group have had work of late, on average."""
        return self.groups[name].average.at(now_s) if name in self.groups else 0.0

    def is_open(self, name: str) -> bool:
        return name in self.groups and self.groups[name].open

    def opened(self) -> Iterable[Load]:
        return self._open[""]

    def choose(self, now_s: float, kind: str = "") -> str | None:
        """The group for a run, if possible one of that kind. None: none takes runs."""
        candidates = self._open.get(kind) or self._open[""]
        if len(candidates) > DRAWN:
            candidates = self._random.sample(candidates, DRAWN)
        best = min(candidates, key=lambda load: load.pressure(now_s), default=None)
        return best.name if best else None

    def place(self, run: str, group: str, row_bytes: int, now_s: float) -> None:
        """Notes that a run is in a group now, wherever it was."""
        placed = Placed(run, row_bytes)
        if earlier := self.forget(run, now_s):
            placed.load = earlier.load
        else:
            placed.load.add(NEW_LOAD, now_s)
        placed.since_s = now_s
        self.homes[run] = load = self.groups[group]
        load.runs[run] = placed
        load.row_bytes += row_bytes
        load.average.add(placed.load.at(now_s), now_s)

    def forget(self, run: str, now_s: float) -> Placed | None:
        """Takes a run out, if it is anywhere."""
        load = self.homes.pop(run, None)
        if load is None:
            return None
        placed = load.runs.pop(run)
        load.row_bytes -= placed.row_bytes
        load.average.add(-placed.load.at(now_s), now_s)
        return placed

    def observe(self, group: str, at_work: Iterable[str], interval_s: float, now_s: float) -> None:
        """Notes which runs of a group have work now, as has been seen every `interval_s`."""
        load, weight = self.groups[group], 1 - 0.5 ** (interval_s / HALF_LIFE_S)
        for name in at_work:
            if placed := load.runs.get(name):
                if placed.load.at(now_s) < IDLE_LOAD:
                    self.returned.append(name)
                placed.load.add(weight, now_s)
                load.average.add(weight, now_s)

"""When runs move since loads differ."""

from collections.abc import Mapping, Sequence
from random import Random

from trainer_service.groups.balancing import PATIENCE_S, REST, Balancing, Move, pause_s
from trainer_service.groups.placement import Placement


class Fleet:
    """Groups whose runs have work all the time, or never."""

    def __init__(self, runs: Mapping[str, int], idle: int = 0, kinds: Sequence[str] = ()) -> None:
        self.placement = Placement(Random(1))
        self.balancing = Balancing(self.placement)
        self.now_s = 0.0
        self.at_work: set[str] = set()
        self.moves: list[tuple[float, Move]] = []
        for index, (group, count) in enumerate(runs.items()):
            self.placement.open(group, kinds[index] if kinds else "alike")
            for number in range(count + idle):
                name = f"{group}{number}"
                self.placement.place(name, group, 0, 0.0)
                if number < count:
                    self.at_work.add(name)

    def go_on(self, seconds: int, *, end_moves: bool = True) -> None:
        for _ in range(seconds):
            self.now_s += 1.0
            for name, load in self.placement.groups.items():
                at_work = [run for run in load.runs if run in self.at_work]
                self.placement.observe(name, at_work, 1.0, self.now_s)
            for move in self.balancing.moves(self.now_s):
                self.moves.append((self.now_s, move))
                if end_moves:
                    self.placement.place(move.run, move.target, 0, self.now_s)
                    self.balancing.ended(move)

    def counts(self) -> dict[str, int]:
        return {
            name: sum(run in self.at_work for run in load.runs)
            for name, load in self.placement.groups.items()
        }


def test_the_fullest_gives_to_the_emptiest_until_they_are_alike() -> None:
    fleet = Fleet({"a": 10, "b": 2}, idle=20)
    fleet.go_on(1200)

    assert fleet.counts() in ({"a": 6, "b": 6}, {"a": 7, "b": 5})
    assert all(move.run in fleet.at_work for _, move in fleet.moves)
    assert len({move.run for _, move in fleet.moves}) == len(fleet.moves)  # none twice


def test_groups_that_are_nearly_alike_stay_as_they_are() -> None:
    for runs in ({"a": 1, "b": 0}, {"a": 3, "b": 2}, {"a": 10, "b": 8}):
        fleet = Fleet(runs, idle=3)
        fleet.go_on(1000)
        assert fleet.moves == []


def test_a_gap_that_has_just_come_moves_nothing() -> None:
    fleet = Fleet({"a": 6, "b": 6})
    fleet.go_on(int(REST * pause_s(0)) + 10)
    fleet.at_work -= {f"b{number}" for number in range(6)}
    fleet.go_on(int(PATIENCE_S))
    assert fleet.moves == []
    fleet.go_on(120)
    assert fleet.moves


def test_a_run_that_returns_after_a_long_rest_moves_at_once() -> None:
    fleet = Fleet({"a": 2, "b": 0}, idle=2)
    fleet.go_on(90)
    assert fleet.moves == []  # two that have come lately
    fleet.go_on(300)
    fleet.moves.clear()
    fleet.at_work = {"a0", "a1", "b0"}  # b0 has not worked for long
    fleet.placement.place("a1", "a", 0, fleet.now_s)
    fleet.placement.place("a0", "a", 0, fleet.now_s)
    fleet.go_on(60)
    fleet.at_work.add("a3")  # it has never worked
    fleet.go_on(2)
    assert [(move.run, move.target) for _, move in fleet.moves] == [("a3", "b")]


def test_a_run_that_has_come_lately_stays() -> None:
    fleet = Fleet({"a": 4, "b": 0})
    fleet.go_on(int(REST * pause_s(0)) - 1)
    assert fleet.moves == []
    fleet.go_on(1)
    assert len(fleet.moves) == 1


def test_a_group_gives_or_takes_one_run_at_a_time() -> None:
    fleet = Fleet({"a": 8, "b": 8, "c": 0, "d": 0})
    fleet.go_on(600, end_moves=False)

    assert len(fleet.moves) == 2
    assert len({name for _, move in fleet.moves for name in (move.source, move.target)}) == 4


def test_no_run_moves_by_itself_to_hardware_of_another_kind() -> None:
    fleet = Fleet({"a": 8, "b": 0}, kinds=("one", "other"))
    fleet.go_on(1000)
    assert fleet.moves == []


def test_a_large_row_rests_longer() -> None:
    assert pause_s(0) * REST == 100
    assert pause_s(10 * 10**9) * REST > 3600

"""Which group a run goes to."""

from random import Random

import pytest

from trainer_service.groups.placement import HALF_LIFE_S, NEW_LOAD, Average, Placement


def placement(*names: str, memory_bytes: int = 0) -> Placement:
    made = Placement(Random(1))
    for name in names:
        made.open(name, memory_bytes=memory_bytes)
    return made


def test_an_average_is_half_as_large_after_its_half_life() -> None:
    average = Average()
    average.add(4.0, 10.0)
    assert average.at(10.0 + HALF_LIFE_S) == pytest.approx(2.0)
    average.add(-5.0, 10.0 + HALF_LIFE_S)
    assert average.at(10.0 + HALF_LIFE_S) == 0.0


def test_new_runs_go_round_before_any_has_shown_what_it_does() -> None:
    groups = placement("a", "b", "c")
    for number in range(9):
        name = groups.choose(0.0)
        assert name
        groups.place(f"r{number}", name, 0, 0.0)

    assert [len(load.runs) for load in groups.groups.values()] == [3, 3, 3]


def test_a_run_goes_where_fewest_have_work_and_not_where_fewest_are() -> None:
    groups = placement("idle", "busy")
    for number in range(50):
        groups.place(f"i{number}", "idle", 0, 0.0)
    for number in range(2):
        groups.place(f"b{number}", "busy", 0, 0.0)
    for second in range(1, 600):
        groups.observe("busy", ["b0", "b1"], 1.0, float(second))

    assert groups.load("busy", 599.0) == pytest.approx(2.0, rel=0.05)
    assert groups.choose(599.0) == "idle"


def test_memory_counts_where_work_does_not_decide() -> None:
    groups = placement("full", "empty", memory_bytes=1000)
    groups.place("r", "full", 900, 0.0)

    assert groups.choose(10 * HALF_LIFE_S) == "empty"


def test_a_run_takes_its_load_along_and_leaves_none() -> None:
    groups = placement("a", "b")
    groups.place("r", "a", 10, 0.0)
    groups.observe("a", ["r"], 5.0, 5.0)
    load = groups.load("a", 5.0)

    groups.place("r", "b", 10, 5.0)

    assert groups.load("a", 5.0) == pytest.approx(0.0)
    assert groups.load("b", 5.0) == pytest.approx(load)
    assert groups.groups["a"].row_bytes == 0
    groups.forget("r", 5.0)
    assert groups.load("b", 5.0) == pytest.approx(0.0)
    assert groups.groups["b"].row_bytes == 0


def test_a_closed_group_gets_nothing_and_none_is_chosen_when_all_are() -> None:
    groups = placement("a", "b")
    groups.place("r", "a", 0, 0.0)
    groups.close("b")
    assert groups.choose(0.0) == "a"
    groups.close("a")
    assert groups.choose(0.0) is None
    groups.open("b")
    assert groups.choose(0.0) == "b"
    groups.forget("r", 0.0)
    groups.remove("a")
    assert set(groups.groups) == {"b"}


def test_a_run_stays_with_its_kind_of_hardware_while_there_is_any() -> None:
    groups = Placement(Random(1))
    groups.open("old", "one")
    groups.open("new", "other")
    for number in range(20):
        groups.place(f"r{number}", "old", 0, 0.0)

    assert groups.choose(0.0, "one") == "old"
    groups.close("old")
    assert groups.choose(0.0, "one") == "new"


def test_among_many_groups_the_loads_stay_near_each_other() -> None:
    groups = placement(*map(str, range(200)))
    for number in range(4000):
        groups.place(f"r{number}", groups.choose(0.0) or "", 0, 0.0)

    counts = [len(load.runs) for load in groups.groups.values()]
    assert NEW_LOAD == 1.0
    assert (min(counts), max(counts)) >= (18, 20)
    assert max(counts) <= 21

"""The checker finds what a bad server would do, and nothing else."""

from copy import deepcopy
from typing import Any

import pytest

from tests.harness.checker import problems

KINDS = ["add", "step", "save", "add", "step", "load", "add", "step", "save"]
STEPS = {2: 1, 5: 2, 8: 2}
History = list[dict[str, Any]]


def opened(life: int, next_place: int, step: int) -> dict[str, Any]:
    return {
        "user": 1,
        "event": "opened",
        "life": life,
        "run": "r",
        "next": next_place,
        "step": step,
    }


def called(place: int) -> dict[str, Any]:
    return {"user": 1, "event": "called", "place": place, "kind": KINDS[place - 1]}


def answered(place: int) -> dict[str, Any]:
    step = {"step": STEPS[place]} if place in STEPS else {}
    return {"user": 1, "event": "answered", "place": place, "answer": f"a{place}", **step}


def final() -> dict[str, Any]:
    return {"user": 1, "event": "final", "run": "r", "next": 10, "step": 2, "weights": "w"}


def undisturbed() -> History:
    calls = [event for place in range(1, 10) for event in (called(place), answered(place))]
    drawn = {"user": 1, "event": "sampled", "key": "k", "answer": "tokens"}
    return [opened(0, 1, 0), *calls, drawn, final()]


def with_a_death() -> History:
    """The process dies when call 5 has been sent and not answered."""
    calls = [event for place in range(6, 10) for event in (called(place), answered(place))]
    return [*undisturbed()[:10], *map(called, (5,)), opened(1, 6, 2), *calls, final()]


def told(history: History) -> str:
    return "; ".join(problems(history, undisturbed()))


@pytest.mark.parametrize("history", [undisturbed(), with_a_death()])
def test_what_may_be_is_no_problem(history: History) -> None:
    assert told(history) == ""


def test_calls_that_nobody_was_told_of_may_be_made_again() -> None:
    history = with_a_death()
    history[history.index(opened(1, 6, 2))] = opened(1, 5, 1)
    at = history.index(opened(1, 5, 1)) + 1
    assert told([*history[:at], called(5), answered(5), *history[at:]]) == ""


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, {"event": "failed", "error": "UNAVAILABLE"}, "was told UNAVAILABLE"),
        (8, {"answer": "other"}, "call 4 has answer other, not a4"),
        (4, {"step": 2}, "call 2 took step 2, not 1"),
        (-1, {"weights": "v"}, "the final weights are v, not w"),
        (-1, {"step": 3}, "ends at step 3, not at 2"),
        (-1, {"step": 1}, "ends at step 1, not at 2"),
        (-1, {"next": 9}, "made 9 calls, and the run has 8"),
        (-1, {"next": 11}, "made 9 calls, and the run has 10"),
        (-1, {"run": "s"}, "has run s beside r"),
        (-2, {"answer": "others"}, "sample k differs"),
        (5, {"event": "guess"}, "event guess has no meaning"),
    ],
)
def test_a_wrong_word_is_found(place: int, change: dict[str, Any], message: str) -> None:
    history = undisturbed()
    if change.get("event") == "failed":
        history.insert(3, {**history[place], **change})
    else:
        history[place] = {**history[place], **change}
    assert message in told(history)


def test_a_lost_call_is_found() -> None:
    history = with_a_death()
    history[history.index(opened(1, 6, 2))] = opened(1, 4, 1)
    assert "call 4 was answered, and is lost: next is 4" in told(history)


def test_a_lost_step_is_found_by_the_count() -> None:
    history = with_a_death()
    history[history.index(opened(1, 6, 2))] = opened(1, 6, 1)
    assert "is at step 1 behind call 5, not at 2" in told(history)


def test_a_doubled_step_is_found_by_the_count() -> None:
    history = with_a_death()
    history[history.index(opened(1, 6, 2))] = opened(1, 6, 3)
    assert "is at step 3 behind call 5, not at 2" in told(history)


def test_a_call_from_nowhere_is_found() -> None:
    history = with_a_death()
    history[history.index(opened(1, 6, 2))] = opened(1, 7, 2)
    assert "call 6 was never made, and next is 7" in told(history)


def test_an_answer_that_changes_is_found() -> None:
    history = undisturbed()
    history.insert(-1, {**answered(3), "answer": "b3"})
    assert "call 3 was answered twice, and differs: b3 is not a3" in told(history)


def test_a_sample_that_changes_is_found() -> None:
    history = undisturbed()
    history.insert(-1, {**history[-2], "answer": "others"})
    assert "sample k was drawn twice, and differs" in told(history)


def test_a_call_without_an_answer_is_found() -> None:
    history = undisturbed()
    history.remove(answered(7))
    assert "call 7 was never answered" in told(history)


def test_an_answer_without_a_call_is_found() -> None:
    history = undisturbed()
    history.remove(called(7))
    assert "call 7 was answered and never made" in told(history)


def test_another_run_is_found() -> None:
    history = with_a_death()
    history[history.index(opened(1, 6, 2))]["run"] = "s"
    assert "has run s beside r" in told(history)


def test_a_user_that_is_missing_or_strange_is_found() -> None:
    assert "user 1: the final weights are not there" in told([])
    stranger = deepcopy(undisturbed())
    for event in stranger:
        event["user"] = 2
    assert "user 2: has no script" in told([*undisturbed(), *stranger])

"""The checker finds what a bad server would do, and nothing else."""

from copy import deepcopy
from typing import Any

import pytest

from tests.harness.checker import crossings, problems

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


def called(place: int, later: int = 0) -> dict[str, Any]:
    """`later`: by so many calls that found no room."""
    about = {"place": place, "sequence": place + later}
    return {"user": 1, "event": "called", **about, "kind": KINDS[place - 1]}


def answered(place: int, later: int = 0) -> dict[str, Any]:
    step = {"step": STEPS[place]} if place in STEPS else {}
    about = {"place": place, "sequence": place + later}
    return {"user": 1, "event": "answered", **about, "answer": f"a{place}", **step}


def refused(place: int, later: int = 0) -> dict[str, Any]:
    about = {"place": place, "sequence": place + later}
    return {"user": 1, "event": "refused", **about, "reason": "RESOURCE_EXHAUSTED"}


def final(later: int = 0) -> dict[str, Any]:
    about = {"run": "r", "next": 10 + later, "step": 2}
    return {
        "user": 1,
        "event": "final",
        **about,
        "weights": "w",
        "saved": {"at-3": "v", "at-9": "w"},
    }


def undisturbed() -> History:
    calls = [event for place in range(1, 10) for event in (called(place), answered(place))]
    drawn = {"user": 1, "event": "sampled", "key": "k", "answer": "tokens"}
    return [opened(0, 1, 0), *calls, drawn, final()]


def with_a_death() -> History:
    """The process dies when call 5 has been sent and not answered."""
    calls = [event for place in range(6, 10) for event in (called(place), answered(place))]
    return [*undisturbed()[:10], *map(called, (5,)), opened(1, 6, 2), *calls, final()]


def made(first: int, last: int, later: int = 0) -> History:
    places = range(first, last + 1)
    return [event for place in places for event in (called(place, later), answered(place, later))]


def with_a_full_store() -> History:
    """The save at 3 finds no room, and is made again when 4 has been added."""
    tried = [called(3), called(4), refused(3), answered(4), called(3, 2), answered(3, 2)]
    return [opened(0, 1, 0), *made(1, 2), *tried, *made(5, 9, later=1), final(later=1)]


def with_an_abandoned_timeline() -> History:
    """It parts behind call 2, and saves others' weights under the first name."""
    elsewhere = [opened(1, 3, 1), *made(3, 5)]
    for event in elsewhere:
        event["timeline"] = 1
    elsewhere[4]["answer"] = "b4"
    saved = {"at-3": "u", "at-9": ""}
    left = {"user": 1, "event": "abandoned", "run": "r", "saved": saved}
    return [
        opened(0, 1, 0),
        *made(1, 2),
        *elsewhere,
        opened(2, 3, 1),
        *made(3, 9),
        left,
        final(),
    ]


def told(history: History, *, refusals: bool = False) -> str:
    return "; ".join(problems(history, undisturbed(), refusals=refusals))


@pytest.mark.parametrize("history", [undisturbed(), with_a_death(), with_an_abandoned_timeline()])
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
        (-1, {"saved": {"at-3": "u", "at-9": "w"}}, "the weights under at-3 are u, not v"),
        (-1, {"saved": {"at-9": "w"}}, "the weights under at-3 are not there, not v"),
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


def test_a_save_that_found_no_room_and_is_made_again_is_no_problem() -> None:
    assert told(with_a_full_store(), refusals=True) == ""


def test_a_refusal_where_there_was_room_is_found() -> None:
    assert "1 saves found no room, and there was room" in told(with_a_full_store())


def test_a_save_that_is_not_made_again_is_found() -> None:
    history = with_a_full_store()
    history.remove(called(3, 2))
    history.remove(answered(3, 2))
    found = told(history, refusals=True)
    assert "call 3 found no room, and was not made again" in found


def test_a_refusal_of_what_saves_nothing_is_found() -> None:
    history = with_a_full_store()
    history.insert(history.index(called(5, 1)), refused(4))
    assert "call 4 saves nothing, and was refused" in told(history, refusals=True)


def test_a_refused_call_that_is_lost_is_found() -> None:
    """It has used up its number."""
    history = [opened(0, 1, 0), *made(1, 2), called(3), refused(3), opened(1, 3, 1)]
    history += [*made(3, 9), final()]
    assert "call 3 was answered, and is lost: next is 3" in told(history, refusals=True)


def test_a_save_that_changes_the_step_is_found() -> None:
    history = with_a_full_store()
    history.insert(-1, opened(1, 11, 3))
    assert "is at step 3 behind call 10, not at 2" in told(history, refusals=True)


def test_weights_of_an_abandoned_timeline_are_found() -> None:
    history = with_an_abandoned_timeline()
    assert crossings(history) == 1
    history[-1]["saved"] = {"at-3": "u", "at-9": "w"}
    assert "the weights under at-3 are those of a timeline that was abandoned" in told(history)
    assert crossings(history) == 0
    history[-1]["saved"] = {"at-3": "v", "at-9": "w"}
    history[-2]["run"] = "one that is not there any more"
    assert crossings(history) == 0


def test_what_is_wrong_on_an_abandoned_timeline_is_found() -> None:
    history = with_an_abandoned_timeline()
    parted = next(place for place, event in enumerate(history) if event.get("timeline"))
    history[parted]["next"] = 2
    assert "user 1 on timeline 1: call 2 was answered, and is lost: next is 2" in told(history)


def test_a_backup_that_lost_an_answer_is_found() -> None:
    history = with_an_abandoned_timeline()
    history[history.index(opened(2, 3, 1))] = opened(2, 2, 0)
    assert "user 1: call 2 was answered, and is lost: next is 2" in told(history)


def test_a_backup_that_remembers_the_abandoned_timeline_is_found() -> None:
    history = with_an_abandoned_timeline()
    history[history.index(opened(2, 3, 1))] = opened(2, 6, 2)
    assert "user 1: call 3 was never made, and next is 6" in told(history)

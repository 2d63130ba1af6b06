"""How far a user is, read from its history."""

from pathlib import Path

from tests.harness.history import Progress, Writer, has_parted, places, progress


def test_a_user_has_left_what_was_under_way_once_all_of_it_is_answered(tmp_path: Path) -> None:
    file = tmp_path / "history-0"
    assert progress(file) == Progress()
    history = Writer(file, 0)

    history.write("called", place=1)
    history.write("called", place=2)
    then = progress(file)
    history.write("answered", place=1)
    assert not progress(file).has_left(then)
    history.write("called", place=3)
    history.write("answered", place=2)
    assert progress(file) == Progress(called=3, answered=2, answers=2)
    assert progress(file).has_left(then)


def test_a_sample_is_waited_for_where_every_call_was_answered(tmp_path: Path) -> None:
    file = tmp_path / "history-0"
    history = Writer(file, 0)
    history.write("called", place=1)
    history.write("answered", place=1)
    then = progress(file)

    assert not progress(file).has_left(then)
    history.write("sampled", key="0-1", answer="tokens")
    assert progress(file).has_left(then)


def test_a_timeline_has_parted_once_what_its_steps_made_is_saved(tmp_path: Path) -> None:
    file = tmp_path / "history-0"
    assert not has_parted(file, 1)
    ours, history, elsewhere = (Writer(file, 0, timeline) for timeline in range(3))
    ours.write("opened", run="r")
    ours.write("called", place=1, sequence=1, kind="step")
    ours.write("answered", place=1, sequence=1)
    history.write("opened", run="r")
    script = ("step", "publish", "add", "step", "save")
    for place, kind in enumerate(script, start=2):
        assert not has_parted(file, 1)
        history.write("called", place=place, sequence=place, kind=kind)
        history.write("answered", place=place, sequence=place)
    assert has_parted(file, 1)
    assert not has_parted(file, 0)

    elsewhere.write("opened", run="another")
    for place, kind in enumerate(script, start=2):
        elsewhere.write("called", place=place, sequence=place, kind=kind)
        elsewhere.write("answered", place=place, sequence=place)
    assert not has_parted(file, 2)


def test_places_are_those_of_a_timeline_and_of_what_came_before_it(tmp_path: Path) -> None:
    file = tmp_path / "history-0"
    ours, abandoned = Writer(file, 0), Writer(file, 0, timeline=1)
    ours.write("called", place=1, sequence=1)
    ours.write("answered", place=1, sequence=1)
    abandoned.write("called", place=2, sequence=2)
    abandoned.write("answered", place=2, sequence=2)
    assert places(file, 1) == ({1: 1, 2: 2}, {1, 2})
    assert places(file, 0) == ({1: 1}, {1})
    ours.write("called", place=1, sequence=2)
    assert places(file, 2) == ({1: 1, 2: 1}, {1})

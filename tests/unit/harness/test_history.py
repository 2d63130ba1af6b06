"""How far a user is, read from its history."""

from pathlib import Path

from tests.harness.history import Progress, Writer, progress


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

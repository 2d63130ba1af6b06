"""What is kept for how long."""

import sqlite3

from trainer_service.calls import Effect, Reply
from trainer_service.jobs import SavedRow
from trainer_service.journal import changes, queries
from trainer_service.journal.records import RequestRecord, RunRecord, call_id, sequence_of
from trainer_service.journal.schema import migrate
from trainer_service.run_description import Gradient, RunState

ANSWER = Reply(b"answer", failed=False)


class Book:
    """A database, and the life of calls in short words."""

    def __init__(self, runs: int = 2) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        migrate(self.db, 0)
        for run in range(1, runs + 1):
            state = RunState(update_time_s=0.0)
            record = RunRecord(run, f"run-{run}", f"origin {run}", {"a": "b"}, 60.0, None, state)
            changes.add_run(self.db, record)

    def accept(self, run: int, sequence: int, method: str = "ForwardBackward") -> None:
        payload = f"payload {run} {sequence}".encode()
        changes.accept(self.db, call_id(run, sequence), method, b"hash", "", payload)

    def end(self, run: int, sequence: int, effect: Effect, digest: int | None = None) -> None:
        changes.end(self.db, call_id(run, sequence), effect, digest, ANSWER)

    def add(self, run: int, sequence: int) -> None:
        """A backward."""
        self.accept(run, sequence)
        self.end(run, sequence, Effect.ADD)

    def cover(self, run: int, sequence: int) -> None:
        changes.cover(self.db, run, SavedRow(sequence, f"{run}-{sequence}", 1))

    def drop(self, run: int, before: int, upto: int) -> None:
        changes.set_state(self.db, run, RunState(dropped=upto))
        changes.drop(self.db, run, before, upto)

    def column(self, query: str) -> list[int]:
        return [value for (value,) in self.db.execute(query)]

    def calls(self, run: int) -> list[int]:
        return self.of(run, "calls")

    def payloads(self, run: int) -> list[int]:
        return self.of(run, "payloads")

    def of(self, run: int, table: str) -> list[int]:
        ids = self.column(f"SELECT id FROM {table} ORDER BY id")
        return [sequence_of(each) for each in ids if each >> 32 == run]


def test_runs_come_back_as_they_were() -> None:
    book = Book()
    state = RunState(
        step=3,
        writer_epoch=2,
        acknowledged=1,
        gradient=Gradient(2, 1, 7),
        update_time_s=5.5,
        inexact_replays=1,
        inexact_note="differs",
        dropped=2,
    )
    changes.set_state(book.db, 2, state)
    changes.set_metadata(book.db, 2, {"c": "d"})

    first, second = queries.load_runs(book.db)

    assert first.state == RunState(update_time_s=0.0)
    assert (second.state, second.metadata, second.origin) == (state, {"c": "d"}, "origin 2")
    changes.set_state(book.db, 3, state)  # one that is gone does not come back
    assert len(list(queries.load_runs(book.db))) == 2


def test_an_answer_is_kept_until_it_is_dropped_and_a_backward_until_it_is_covered() -> None:
    book = Book()
    for sequence in (1, 2, 3):
        book.add(1, sequence)
    book.drop(1, 0, 2)
    assert book.column("SELECT id & 255 FROM answers") == [3]
    assert book.calls(1) == book.payloads(1) == [1, 2, 3]

    book.cover(1, 3)

    assert book.payloads(1) == []
    assert book.calls(1) == [3]  # whose answer is to be kept
    book.drop(1, 2, 3)
    assert book.calls(1) == []


def test_a_call_that_changes_nothing_leaves_its_answer_alone() -> None:
    book = Book()
    book.accept(1, 1, "Forward")
    book.end(1, 1, Effect.NONE)
    assert book.payloads(1) == []
    (call,) = queries.load_calls(book.db, 1, 0)
    assert (call.sequence, call.method, call.answer, call.payload) == (
        1,
        "Forward",
        b"Manswer",
        None,
    )

    book.drop(1, 0, 1)

    assert book.calls(1) == []


def test_calls_that_have_not_ended_come_back_with_what_was_sent() -> None:
    book = Book()
    book.accept(1, 1)
    changes.die(book.db, call_id(1, 1))
    changes.die(book.db, call_id(1, 1))

    (call,) = queries.load_calls(book.db, 1, 0)

    assert (call.payload, call.answer, call.deaths) == (b"payload 1 1", None, 2)


def test_the_past_is_what_changed_the_row_behind_its_snapshot() -> None:
    book = Book()
    book.add(1, 1)
    book.accept(1, 2, "OptimStep")
    book.end(1, 2, Effect.STEP, digest=2**64 - 5)
    book.accept(1, 3, "Forward")
    book.end(1, 3, Effect.NONE)
    book.accept(1, 4, "DiscardGradient")
    book.end(1, 4, Effect.CLEAR)
    book.accept(1, 5)
    book.add(2, 1)

    past = queries.load_past(book.db, 1)

    assert [(call.sequence, call.effect) for call in past] == [
        (1, Effect.ADD),
        (2, Effect.STEP),
        (4, Effect.CLEAR),
    ]
    assert past[1].digest == 2**64 - 5
    changes.cover(book.db, 1, SavedRow(2, "file", 1))
    assert [call.sequence for call in queries.load_past(book.db, 1)] == [4]


def test_a_run_that_is_deleted_leaves_nothing_and_its_number_is_not_given_again() -> None:
    book = Book()
    for run in (1, 2):
        book.add(run, 1)
        book.accept(run, 2)
        book.cover(run, 1)

    changes.begin_removal(book.db, 2, named=True)
    assert [run.removing for run in queries.load_runs(book.db)] == [None, True]
    changes.remove_run(book.db, 2)

    assert [run.number for run in queries.load_runs(book.db)] == [1]
    for table in ("calls", "payloads", "answers"):
        assert book.of(2, table) == []
        assert book.of(1, table)
    assert queries.load_server(book.db)["last_run"] == "2"


def test_requests_are_remembered_for_a_while() -> None:
    book = Book()
    old, new = (
        RequestRecord("ann", name, b"hash", b"answer", time_s)
        for name, time_s in (("old", 1.0), ("new", 2.0))
    )
    for request in (new, old):
        changes.add_request(book.db, request)
    assert list(queries.load_requests(book.db)) == [old, new]

    changes.forget_requests(book.db, 1.5)

    assert list(queries.load_requests(book.db)) == [new]

"""What is kept for how long."""

import sqlite3

import pytest

from trainer_service.journal import changes, queries, records
from trainer_service.journal.records import (
    Effect,
    RequestRecord,
    RunRecord,
    SnapshotRecord,
    TileRecord,
    key,
)
from trainer_service.journal.schema import migrate
from trainer_service.run.gradient import GradientCounts
from trainer_service.run.run import RunState


class Book:
    """A database, and the life of calls in short words."""

    def __init__(self, runs: int = 2) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        migrate(self.db, 0)
        for run in range(1, runs + 1):
            state = RunState(update_time_s=0.0)
            record = RunRecord(run, f"origin {run}", {"a": "b"}, 60.0, state, 0, False)
            changes.add_run(self.db, record, f"run-{run}")

    def accept(self, run: int, sequence: int, method: str = "ForwardBackward") -> None:
        payload = f"payload {run} {sequence}".encode()
        changes.accept(self.db, key(run, sequence), method, b"hash", payload)

    def end(self, run: int, sequence: int, effect: Effect, digest: int | None = None) -> None:
        changes.end(self.db, key(run, sequence), effect, digest, b"answer")

    def add(self, run: int, sequence: int, plan: int | None = None) -> None:
        """A backward, computed in a plan of its own unless one is given."""
        self.accept(run, sequence)
        if plan is None:
            self.plan(key(run, sequence), (run, sequence))
        self.end(run, sequence, Effect.ADD)

    def plan(self, number: int, *calls: tuple[int, int]) -> None:
        tiles = [TileRecord(run, sequence, 0, 0, 1) for run, sequence in calls]
        changes.add_plan(self.db, number, tiles)

    def cover(self, run: int, sequence: int, *, shared: bool = False) -> None:
        snapshot = SnapshotRecord(sequence, f"{run}-{sequence}", 1)
        changes.cover(self.db, run, snapshot, shared_plans=shared)

    def column(self, query: str) -> list[int]:
        return [value for (value,) in self.db.execute(query)]

    def calls(self, run: int) -> list[int]:
        ids = self.column("SELECT id FROM calls ORDER BY id")
        return [sequence for number, sequence in map(records.place, ids) if number == run]

    def payloads(self, run: int) -> list[int]:
        ids = self.column("SELECT id FROM payloads ORDER BY id")
        return [sequence for number, sequence in map(records.place, ids) if number == run]


def test_runs_come_back_as_they_were() -> None:
    book = Book()
    state = RunState(
        step=3,
        writer_epoch=2,
        acknowledged=1,
        gradient=GradientCounts(2, 1, 7),
        update_time_s=5.5,
        inexact_replays=1,
        inexact_note="differs",
    )
    changes.set_state(book.db, 2, state)
    changes.set_metadata(book.db, 2, {"c": "d"})

    first, second = queries.load_runs(book.db)

    assert first.state == RunState(update_time_s=0.0)
    assert (second.state, second.metadata, second.origin) == (state, {"c": "d"}, "origin 2")
    changes.set_state(book.db, 3, state)  # one that is gone does not come back
    assert len(list(queries.load_runs(book.db))) == 2


def test_an_answer_is_kept_until_it_is_acknowledged_and_a_backward_until_it_is_covered() -> None:
    book = Book()
    for sequence in (1, 2, 3):
        book.add(1, sequence)
    changes.acknowledge(book.db, 1, 0, 2)
    assert book.column("SELECT id & 255 FROM answers") == [3]
    assert book.calls(1) == book.payloads(1) == [1, 2, 3]

    book.cover(1, 3)

    assert book.payloads(1) == []
    assert book.calls(1) == [3]  # whose answer is to be kept
    assert book.column("SELECT count(*) FROM tiles") == [0]
    changes.acknowledge(book.db, 1, 2, 3)
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
        b"answer",
        None,
    )

    changes.acknowledge(book.db, 1, 0, 1)

    assert book.calls(1) == []


def test_calls_that_have_not_ended_come_back_with_what_was_sent() -> None:
    book = Book()
    book.accept(1, 1)
    changes.die(book.db, key(1, 1))
    changes.die(book.db, key(1, 1))

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

    past = queries.load_past(book.db, 1, 0)

    assert [(call.sequence, call.effect) for call in past] == [
        (1, Effect.ADD),
        (2, Effect.STEP),
        (4, Effect.CLEAR),
    ]
    assert past[1].digest == 2**64 - 5
    assert [call.sequence for call in queries.load_past(book.db, 1, 2)] == [4]
    assert [run.dirty for run in queries.load_runs(book.db)] == [True, True]
    book.cover(1, 4)
    assert [run.dirty for run in queries.load_runs(book.db)] == [False, True]


def test_a_shared_plan_is_kept_whole_until_no_run_needs_it() -> None:
    book = Book()
    for run in (1, 2):
        book.accept(run, 1)
    book.accept(1, 2, "Forward")
    book.plan(7, (1, 1), (2, 1), (1, 2))
    for run in (1, 2):
        book.end(run, 1, Effect.ADD)
    book.end(1, 2, Effect.NONE)
    changes.acknowledge(book.db, 1, 0, 2)

    book.cover(1, 2, shared=True)

    assert (book.payloads(1), book.payloads(2)) == ([1, 2], [1])
    assert list(queries.load_plans(book.db, [key(2, 1)])) == [7]
    assert [tile.run for tile in queries.load_plans(book.db, [key(2, 1)])[7]] == [1, 2, 1]

    book.cover(2, 1, shared=True)

    assert book.payloads(1) == book.payloads(2) == []
    assert (book.calls(1), book.calls(2)) == ([], [1])


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_that_is_deleted_leaves_only_what_others_need(shared: bool) -> None:
    book = Book()
    for run in (1, 2):
        book.accept(run, 1)
    book.plan(7, (1, 1), (2, 1))
    for run in (1, 2):
        book.end(run, 1, Effect.ADD)

    changes.remove_run(book.db, 1, shared_plans=shared)

    assert [run.number for run in queries.load_runs(book.db)] == [2]
    assert book.payloads(1) == ([1] if shared else [])
    assert book.column("SELECT number FROM runs") == ([1, 2] if shared else [2])
    assert queries.load_origin(book.db, 2) == "origin 2"
    book.cover(2, 1, shared=shared)
    assert book.payloads(1) == book.calls(1) == []
    assert book.column("SELECT number FROM runs") == [2]
    assert queries.next_number(book.db) == 3


def test_requests_are_remembered_for_a_while() -> None:
    book = Book()
    old, new = (
        RequestRecord("ann", name, b"hash", "null", time_s)
        for name, time_s in (("old", 1.0), ("new", 2.0))
    )
    for request in (new, old):
        changes.add_request(book.db, request)
    assert list(queries.load_requests(book.db)) == [old, new]

    changes.forget_requests(book.db, 1.5)

    assert list(queries.load_requests(book.db)) == [new]

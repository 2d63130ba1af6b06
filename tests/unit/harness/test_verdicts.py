"""What may become of runs beside the scripts, and what is found that may not."""

from dataclasses import replace
from typing import Any

import pytest

from tests.harness.verdicts import (
    Deleted,
    Lost,
    Neighbour,
    problems_of_deletion,
    problems_of_loss,
)

NOT_FOUND = "TRAINING_RUN_NOT_FOUND"
NEIGHBOUR = Neighbour("n", 2, (2,), "ANSWERED")
DELETED = Deleted(
    run="r",
    named=True,
    calls=("ANSWERED", NOT_FOUND),
    opened=NOT_FOUND,
    deleted_again=NOT_FOUND,
    listed=False,
    tables=(),
    files=(),
    checkpoints=(),
)
DAMAGED = Lost(
    run="r",
    executed=True,
    calls=("ANSWERED", "TRAINING_RUN_LOST"),
    reason="TRAINING_RUN_LOST",
    named="r",
    message="weights lost: damage",
)
UNDONE = replace(
    DAMAGED,
    executed=False,
    calls=("ANSWERED", "REQUEST_DAMAGED", "ANSWERED"),
    reason="ANSWERED",
    named="",
    message="",
)
KEPT = ("mint://r/weights/kept",)


@pytest.mark.parametrize("found", [DELETED, replace(DELETED, named=False, checkpoints=KEPT)])
def test_a_deletion_that_leaves_nothing_is_right(found: Deleted) -> None:
    assert list(problems_of_deletion(found, NEIGHBOUR)) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"calls": ("ANSWERED", "INTERNAL")}, "call 2 was told INTERNAL"),
        ({"opened": "ANSWERED"}, "to open it was told ANSWERED"),
        ({"deleted_again": "ANSWERED"}, "to delete it again was told ANSWERED"),
        ({"listed": True}, "is listed"),
        ({"tables": ("calls", "answers")}, "has left tables calls, answers"),
        ({"files": ("r-3.safetensors",)}, "has left files r-3.safetensors"),
        ({"checkpoints": KEPT}, "has checkpoints"),
        ({"named": False}, "has checkpoints ()"),
    ],
)
def test_what_a_deletion_leaves_is_found(change: dict[str, Any], problem: str) -> None:
    (found,) = problems_of_deletion(replace(DELETED, **change), NEIGHBOUR)
    assert found.startswith(f"deleted run r: {problem}")


@pytest.mark.parametrize("found", [DAMAGED, UNDONE])
def test_a_record_that_costs_its_run_or_its_call_alone_is_right(found: Lost) -> None:
    assert list(problems_of_loss(found, NEIGHBOUR)) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"calls": ("ANSWERED",)}, "is told ANSWERED, and of itself says nothing"),
        ({"calls": ("REQUEST_DAMAGED",) * 2}, "is told ANSWERED, and of itself says nothing"),
        ({"calls": ("REQUEST_DAMAGED", "INTERNAL")}, "call 2 was told INTERNAL"),
        ({"reason": "INTERNAL"}, "is told INTERNAL, and of itself says nothing"),
        ({"message": "weights lost"}, "is told ANSWERED, and of itself says weights lost"),
    ],
)
def test_more_than_the_call_that_was_not_executed_is_found(
    change: dict[str, Any], problem: str
) -> None:
    assert f"damaged run r: {problem}" in problems_of_loss(replace(UNDONE, **change), NEIGHBOUR)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"calls": ("INTERNAL",)}, "call 1 was told INTERNAL"),
        ({"reason": "ANSWERED", "named": ""}, "is told ANSWERED of nobody"),
        ({"named": "n"}, "is told TRAINING_RUN_LOST of n"),
        ({"message": ""}, "says of itself: nothing"),
    ],
)
def test_damage_that_is_hidden_or_unclear_is_found(change: dict[str, Any], problem: str) -> None:
    (found,) = problems_of_loss(replace(DAMAGED, **change), NEIGHBOUR)
    assert found == f"damaged run r: {problem}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": (1,)}, "is at steps (1,), not at 2"),
        ({"steps": ()}, "is at steps (), not at 2"),
        ({"saved": "CHECKPOINT_NOT_FOUND"}, "its checkpoint is told CHECKPOINT_NOT_FOUND"),
    ],
)
def test_a_neighbour_that_was_touched_is_found(change: dict[str, Any], problem: str) -> None:
    neighbour = replace(NEIGHBOUR, **change)
    assert list(problems_of_deletion(DELETED, neighbour)) == [f"neighbour n: {problem}"]
    assert list(problems_of_loss(DAMAGED, neighbour)) == [f"neighbour n: {problem}"]

"""Processes are killed at every step of what the trainer promises, under a load of several users.

The engine is one of sums without a model, so that the processes start fast; everything else is
real. Whatever dies, all answers and the final weights are those of a server on which nothing died.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from checkpoint_store import CheckpointStore
from tests.engines.echo_jobs import MODEL
from tests.supervised import Supervised, dying_at, summing
from tests.training_load import Answers, Watch, train_all

USERS, STEPS = 4, 8
Outcome = list[tuple[Answers, dict[str, Any]]]


def run_load(
    service: Supervised, folder: Path, watch: Watch = lambda user, answers: None
) -> Outcome:
    """What each user was answered, and the final state."""
    store = CheckpointStore(folder / "store")
    found = []
    for answers, path in train_all(service.address, USERS, STEPS, MODEL.vocabulary_size, watch):
        opened = store.open(path, tenant="default")
        state = {name: array.tobytes() for name, array in opened.weights().items()}
        found.append((answers, state | {"step": opened.manifest.step}))
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """On a server on which nothing dies."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with serving(folder) as service:
        outcome = run_load(service, folder)
        assert service.starts == 1
    return outcome


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """Where users were told, or have, something else, briefly."""
    differing = []
    for user, ((answers, state), (others, other)) in enumerate(zip(found, expected, strict=True)):
        for place, (answer, another) in enumerate(zip(answers, others, strict=True)):
            if answer != another:
                differing.append(f"user {user} answer {place}: {answer} is not {another}"[:300])
        if state != other:
            differing.append(f"user {user}: the final state differs")
    return differing


def serving(folder: Path, *points: str) -> AbstractContextManager[Supervised]:
    """Dies at the points, one at each start."""
    return summing(folder, *map(dying_at, points), snapshot_s=0.02)


FRONT_POINTS = (
    "journal:before-commit@1",
    "journal:before-commit@9",
    "journal:before-commit@30",
    "journal:after-commit@2",
    "journal:after-commit@17",
    "snapshot:before-journal@2",
    "recovery:restored@2",
)
ENGINE_POINTS = (
    "engine:after-Plan@5",
    "engine:after-StepRows@4",
    "engine:after-LoadRow@1",
    "engine:after-SaveCheckpoint@2",
    "engine:after-CreateRow@3",
    "snapshot:before-rename@2",
    "snapshot:after-rename@3",
)


@pytest.mark.parametrize("point", FRONT_POINTS)
def test_a_front_that_dies_anywhere_loses_and_repeats_nothing(
    point: str, tmp_path: Path, expected: Outcome
) -> None:
    # Restoring happens after a death: the first start dies of something else.
    faults = ("journal:after-commit@20", point) if point.startswith("recovery") else (point,)
    with serving(tmp_path, *faults) as service:
        assert differences(run_load(service, tmp_path), expected) == []
        assert service.starts == len(faults) + 1
        assert service.exits == [-9] * len(faults)


@pytest.mark.parametrize("point", ENGINE_POINTS)
def test_an_engine_that_dies_anywhere_loses_and_repeats_nothing(
    point: str, tmp_path: Path, expected: Outcome
) -> None:
    with serving(tmp_path, f"{point}@{tmp_path / 'died'}") as service:
        assert differences(run_load(service, tmp_path), expected) == []
        assert service.starts == 1
        assert (tmp_path / "died").exists()


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_time_lose_and_repeat_nothing(
    seed: int, tmp_path: Path, expected: Outcome
) -> None:
    """Front and engine in turn, also while one restores what the other has left."""
    random = Random(seed)
    with serving(tmp_path) as service:
        kills = [service.kill, service.kill_engine, service.restart] * 2
        random.shuffle(kills)
        whens = dict(zip(random.sample(range(3, 30), len(kills)), kills, strict=True))

        def kill(user: int, answers: int) -> None:
            if user == 0 and answers in whens:
                whens.pop(answers)()

        assert differences(run_load(service, tmp_path, kill), expected) == []
        assert len(whens) <= 2  # those that were due after the last answer

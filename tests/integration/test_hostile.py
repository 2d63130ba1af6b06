"""One tenant sends the worst it can, and nothing changes for another; `make hostile` for longer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.attacks import ATTACKS, Hostile
from tests.hostile.stage import Stage, staged

SIZE_MIB = 4


@pytest.fixture(scope="module")
def stage(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(qwen3_folder, tmp_path_factory.mktemp("hostile"), SIZE_MIB) as stage:
        yield stage


@pytest.fixture(scope="module")
def quiet(stage: Stage) -> list[Any]:
    return stage.neighbour.work()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_neighbour_does_not_notice(
    stage: Stage, quiet: list[Any], attack: Callable[[Hostile], None]
) -> None:
    with stage.unharmed(quiet):
        attack(stage.hostile)

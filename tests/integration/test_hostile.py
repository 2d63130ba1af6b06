"""One tenant sends the worst it can, and nothing changes for another; `make hostile` for longer."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.attacks import ATTACKS, Hostile
from tests.hostile.stage import Stage, staged

SIZE_MIB = 4
MOST_MIB = 400  # by which a front may have grown: what its allocator keeps
MOST_DESCRIPTORS = 20


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
    engines, descriptors = stage.engines(), stage.descriptors()
    resident_mib, logs = stage.resident_mib(), stage.logs()
    seen: list[list[Any]] = []
    ended = threading.Event()

    def work() -> None:
        while not seen or not ended.is_set():
            seen.append(stage.neighbour.work())

    neighbour = threading.Thread(target=work)
    neighbour.start()
    try:
        attack(stage.hostile)
    finally:
        ended.set()
        neighbour.join()

    assert seen
    assert all(each == quiet for each in seen)
    assert stage.engines() == engines
    new = [now[len(before) :] for now, before in zip(stage.logs(), logs, strict=True)]
    assert "code=INTERNAL" not in "".join(new)
    assert "Traceback" not in "".join(new)
    for now, before in zip(stage.descriptors(), descriptors, strict=True):
        assert now <= before + MOST_DESCRIPTORS
    for now, before in zip(stage.resident_mib(), resident_mib, strict=True):
        assert now <= before + MOST_MIB

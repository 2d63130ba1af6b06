"""The power goes at any moment of whatever the store does."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from checkpoint_store import CheckpointStore, Manifest, new_manifest
from mint_core.errors import AlreadyExists, CheckpointNotFound
from tests.checkpoint_files import moments, publish_as, publish_checkpoint
from tests.power_loss import Film, Killed, filmed
from tests.unit.checkpoint_store.conftest import SPEC, adapter

Found = dict[str, int]  # steps of what opens, by the path of its name
Act = Callable[[CheckpointStore], object]
A, B = "mint://r-1/weights/a", "mint://r-1/weights/b"


def save(store: CheckpointStore, name: str = "a", step: int = 1, **changes: object) -> str:
    arguments = {
        "training_run_id": "r-1",
        "kind": "weights",
        "tenant": "t",
        "base_model": "tiny",
        "base_fingerprint": "f00d",
        "spec": SPEC,
        "step": step,
        **adapter(seed=step),
    }
    manifest = publish_checkpoint(store, name=name, **(arguments | changes))  # type: ignore[arg-type]
    return str(manifest.revision_path)


def found(root: Path) -> Found:
    """What the store lists, all of which opens whole."""
    store = CheckpointStore(root)
    steps = {}
    for manifest in store.list(tenant="t"):
        opened = store.open(str(manifest.path), tenant="t")
        weights, expected = opened.weights(), adapter(seed=opened.manifest.step)
        assert all(np.array_equal(weights[name], expected["weights"][name]) for name in weights)
        assert moments(opened)[0].keys() == expected["exp_avg"].keys()
        steps[str(manifest.path)] = opened.manifest.step
    return steps


@dataclass(frozen=True)
class Deed:
    """Something that is done in a store, what is found before, and when it has been done."""

    act: Act
    before: Found
    after: Found
    first: Act = lambda store: None
    between: tuple[Found, ...] = ()


def past(store: CheckpointStore) -> None:
    save(store, step=1)
    save(store, "b", step=2, expire_time=datetime.now(UTC) + timedelta(hours=1))


def two(store: CheckpointStore) -> None:
    save(store, step=1)
    save(store, step=2)
    save(store, "b", step=3)


def sweep_later(store: CheckpointStore) -> None:
    store.sweep(now=datetime.now(UTC) + timedelta(days=2))


DEEDS = {
    "the first save": Deed(save, {}, {A: 1}),
    "a save over another": Deed(lambda s: save(s, step=2), {A: 1}, {A: 2}, first=save),
    "a second name": Deed(lambda s: save(s, "b", step=2), {A: 1}, {A: 1, B: 2}, first=save),
    "a revision's end": Deed(
        lambda s: s.delete(f"{A}@2", tenant="t"), {A: 2, B: 3}, {A: 1, B: 3}, first=two
    ),
    "a name's end": Deed(
        lambda s: s.delete(A, tenant="t"),
        {A: 2, B: 3},
        {B: 3},
        first=two,
        between=({A: 1, B: 3},),
    ),
    "a run's end": Deed(
        lambda s: s.delete_run("r-1", tenant="t", named=True),
        {A: 2, B: 3},
        {},
        first=two,
        between=({A: 2}, {A: 1}, {A: 1, B: 3}, {B: 3}),
    ),
    "a sweep": Deed(sweep_later, {A: 1, B: 2}, {A: 1}, first=past),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.mark.parametrize("what", DEEDS)
def test_all_or_nothing_is_left_and_what_was_acknowledged_stays(
    root: Path, tmp_path: Path, what: str
) -> None:
    deed = DEEDS[what]
    deed.first(CheckpointStore(root))
    with filmed(root) as film:
        deed.act(CheckpointStore(root))

    assert len(film.moments) > 5
    for number, moment in enumerate(film.moments):
        done = moment is film.moments[-1]
        legal = [deed.after] if done else [deed.before, deed.after, *deed.between]
        for why, folder in moment.rebuilt(tmp_path / f"rebuilt-{number}"):
            assert found(folder) in legal, why


def test_life_goes_on_after_any_of_it(root: Path, tmp_path: Path) -> None:
    with filmed(root) as film:
        save(CheckpointStore(root), step=1)
    for number, moment in enumerate(film.moments):
        for why, folder in moment.rebuilt(tmp_path / f"rebuilt-{number}"):
            save(CheckpointStore(folder), step=5)
            sweep_later(CheckpointStore(folder))
            assert found(folder) == {A: 5}, why


def dies_first(root: Path, kill_before: int, act: Act, retry: Act) -> Film | None:
    """The film of a process that is killed in its work and of another that does it again; None if
    the first has lived to its end.
    """
    with filmed(root, kill_before=kill_before) as film:
        try:
            act(CheckpointStore(root))
        except Killed:
            film.kill_before = None
            retry(CheckpointStore(root))
            return film
    return None


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_save_that_another_process_has_begun_stays_too(tmp_path: Path, overwrite: bool) -> None:
    """What it has seen of the first, and says is saved, need not be on disk yet."""

    def act(store: CheckpointStore) -> None:
        save(store, sequence=7, overwrite=overwrite)

    for operation in count():
        root = tmp_path / f"store-{operation}"
        root.mkdir()
        film = dies_first(root, operation, act, act)
        if film is None:
            break
        for why, folder in film.moments[-1].rebuilt(tmp_path / f"rebuilt-{operation}"):
            assert found(folder) == {A: 1}, f"killed before operation {operation}, {why}"
    assert operation > 10


def test_a_conflict_that_is_told_stays_one(tmp_path: Path) -> None:
    """A name that somebody was told is taken is taken after the power is back, too."""

    def conflict(store: CheckpointStore) -> None:
        try:
            save(store, step=2, overwrite=False)
        except AlreadyExists:
            told.append(operation)

    told: list[int] = []
    for operation in count():
        root = tmp_path / f"store-{operation}"
        root.mkdir()
        film = dies_first(root, operation, save, conflict)
        if film is None:
            break
        expected = {A: 1} if operation in told else {A: 2}
        for why, folder in film.moments[-1].rebuilt(tmp_path / f"rebuilt-{operation}"):
            assert found(folder) == expected, f"killed before operation {operation}, {why}"
    assert told


def delete(store: CheckpointStore) -> None:
    with suppress(CheckpointNotFound):  # which is an answer, too
        store.delete(A, tenant="t")


def delete_run(store: CheckpointStore) -> None:
    store.delete_run("r-1", tenant="t", named=True)


@pytest.mark.parametrize("act", [delete, delete_run])
def test_a_deletion_that_another_process_has_begun_stays_too(tmp_path: Path, act: Act) -> None:
    for operation in count():
        root = tmp_path / f"store-{operation}"
        save(CheckpointStore(root))
        film = dies_first(root, operation, act, act)
        if film is None:
            break
        for why, folder in film.moments[-1].rebuilt(tmp_path / f"rebuilt-{operation}"):
            assert found(folder) == {}, f"killed before operation {operation}, {why}"
    assert operation > 3


def test_a_snapshot_that_was_announced_is_whole_or_not_there(root: Path, tmp_path: Path) -> None:
    snapshot = new_manifest(
        None,
        Manifest(
            training_run_id="r-1",
            kind="sampler_weights",
            tenant="t",
            base_model="tiny",
            base_fingerprint="f00d",
            spec=SPEC,
            step=1,
        ),
    )
    path = str(snapshot.revision_path)
    with filmed(root) as film:
        store = CheckpointStore(root)
        store.announce(snapshot)
        publish_as(store, snapshot, adapter(seed=1)["weights"])

    for number, moment in enumerate(film.moments):
        for why, folder in moment.rebuilt(tmp_path / f"rebuilt-{number}"):
            store = CheckpointStore(folder)
            if moment is film.moments[-1] or store.has(snapshot.revision_path):
                weights = store.open(path, tenant="t").weights()
                expected = adapter(seed=1)["weights"]
                assert all(np.array_equal(weights[n], expected[n]) for n in expected), why

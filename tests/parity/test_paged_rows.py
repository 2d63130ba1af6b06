"""Rows that leave the device and come back are what they were: bitwise equal to rows that stay."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mint_core.lora.bank import Part
from mint_core.lora.spec import LoraRequest
from tests.engines_in_process import EngineRun, RowArrays, make_documents, make_engine, run_plan
from trainer_service.engine.engine import Engine
from trainer_service.errors import RowStorageFull
from trainer_service.jobs import (
    AdamParams,
    ClearGradient,
    CrossEntropy,
    DropRow,
    Tile,
)

STEPS = 10
REQUESTS = [LoraRequest(rank=rank, seed=rank) for rank in (1, 8, 13, 32, 16)]
PART_BYTES = 4 * 2624  # of the tiny model, per stored rank
LARGEST_ROW = 4 * 32 * PART_BYTES
PARAMS = AdamParams(learning_rate=1e-2)


def equal(ours: RowArrays, theirs: RowArrays) -> bool:
    pairs = [
        (ours.weights, theirs.weights),
        (ours.exp_avg, theirs.exp_avg),
        (ours.exp_avg_sq, theirs.exp_avg_sq),
    ]
    return ours.step == theirs.step and all(
        a is not None and b is not None and all(np.array_equal(a[name], b[name]) for name in b)
        for a, b in pairs
    )


def make_runs(engine: Engine) -> list[EngineRun]:
    return [EngineRun(engine, f"run{i}", r, random=i) for i, r in enumerate(REQUESTS)]


def train(engine: Engine, seed: int) -> tuple[list[list[float]], list[RowArrays]]:
    """Runs in random company and order, with gradients of one to three backwards, some of them
    thrown away; the norm of each step's gradient, by run, and the rows at the end.
    """
    rng = np.random.default_rng(seed)
    runs = make_runs(engine)
    norms: list[list[float]] = [[] for _ in runs]
    while min(map(len, norms)) < STEPS:
        chosen = rng.permutation(len(runs))[: rng.integers(1, len(runs) + 1)]
        tiles = [
            runs[i].tile(
                make_documents(int(rng.integers(1000)), (5, 9)),
                CrossEntropy(),
                backward=bool(rng.random() < 0.8),
            )
            for i in chosen
        ]
        assert not any(result.error for result in run_plan(engine, *tiles))
        for i in chosen:
            fate = rng.random()
            if fate < 0.7:
                norms[i].append(runs[i].step(PARAMS).grad_norm)
            elif fate < 0.8:
                engine.run(ClearGradient(runs[i].name))
            elif fate < 0.9:
                runs[i].load(runs[i].export())
    return norms, [run.export() for run in runs]


@pytest.fixture(scope="module")
def resident(qwen3_folder: Path) -> tuple[list[list[float]], list[RowArrays]]:
    """What becomes of the runs where all have room: their norms, and their rows at the end."""
    engine = make_engine(qwen3_folder)
    trained = train(engine, 3)
    assert engine.row_counts().device == len(REQUESTS)
    return trained


@pytest.mark.parametrize("host_bytes", [0, LARGEST_ROW // 2], ids=["disk", "host and disk"])
def test_paged_runs_equal_those_that_stay(
    qwen3_folder: Path, host_bytes: int, resident: tuple[list[list[float]], list[RowArrays]]
) -> None:
    """Beside a GPU host memory lies between; on a CPU the limit is 0 unless a test sets it."""
    engine = make_engine(
        qwen3_folder, row_memory_bytes=LARGEST_ROW, host_row_memory_bytes=host_bytes
    )
    norms, rows = train(engine, 3)

    assert norms == resident[0]
    counts = engine.row_counts()
    assert counts.disk > 0
    assert bool(counts.host) == bool(host_bytes)
    for ours, theirs in zip(rows, resident[1], strict=True):
        assert equal(ours, theirs)


class SmallDisk:
    """Makes it fail to write the files of some runs, as on a full disk."""

    def __init__(self, folder: Path) -> None:
        (self._folder,) = folder.iterdir()

    def fill(self, *runs: str) -> None:
        self.free(*runs)
        for run, part in product(runs, Part):
            (self._folder / f"{run}.{part}.row").symlink_to("/dev/full")

    def free(self, *runs: str) -> None:
        for run, part in product(runs, Part):
            (self._folder / f"{run}.{part}.row").unlink(missing_ok=True)


def test_a_full_disk_is_an_error_of_the_run_that_needs_room_alone(
    qwen3_folder: Path, tmp_path: Path
) -> None:
    room_for_two = 2 * 2 * 8 * PART_BYTES  # weights and gradients
    engine = make_engine(qwen3_folder, row_memory_bytes=room_for_two, row_folder=tmp_path)
    disk = SmallDisk(tmp_path)
    away, a, b = (EngineRun(engine, name, REQUESTS[1], random=1) for name in ("away", "a", "b"))
    expected = EngineRun(make_engine(qwen3_folder), "a", REQUESTS[1], random=1)

    def backward(run: EngineRun, seed: int) -> Tile:
        return run.tile(make_documents(seed, (7,)), CrossEntropy())

    for run in (away, a, b, expected):
        run.compute(backward(run, 1))
    assert engine.row_counts().disk == 1

    disk.fill("a", "b")
    with pytest.raises(RowStorageFull, match="No space left on device"):
        EngineRun(engine, "late", REQUESTS[1])
    disk.fill("a", "b")
    results = run_plan(engine, backward(a, 2), backward(away, 2))
    expected.compute(backward(expected, 2))
    assert results[0].error is None
    assert isinstance(results[1].error, RowStorageFull)

    disk.free("a", "b")
    for run in (a, expected):
        run.step(PARAMS)
    assert equal(a.export(), expected.export())
    assert b.step(PARAMS).grad_norm > 0
    assert away.step(PARAMS).grad_norm > 0  # the gradient is still that of its first backward
    EngineRun(engine, "late", REQUESTS[1])


def test_a_run_that_never_stepped_costs_its_weights_alone(qwen3_folder: Path) -> None:
    engine = make_engine(qwen3_folder, row_memory_bytes=8 * 8 * PART_BYTES)
    for i in range(8):
        run = EngineRun(engine, f"run{i}", REQUESTS[1])
        run.compute(run.tile(make_documents(1, (4,)), CrossEntropy(), backward=False))
    assert engine.row_counts().device == 8

    run.compute(run.tile(make_documents(1, (4,)), CrossEntropy()))

    assert engine.row_counts().disk == 1


def test_moving_rows_is_a_sign_of_life(qwen3_folder: Path) -> None:
    """The front kills an engine that says nothing for long, and a disk may be slow."""
    signs: list[None] = []
    engine = make_engine(qwen3_folder, progress=lambda: signs.append(None), row_memory_bytes=1)
    tiles = [run.tile(make_documents(1, (4,)), CrossEntropy()) for run in make_runs(engine)]
    signs.clear()
    run_plan(engine, *tiles)
    assert len(signs) >= 2 * len(tiles)  # each comes for its pass, and another leaves for it


def saved_vectors(run: EngineRun) -> dict[str, np.ndarray]:
    """By part, as the state has them."""
    file = run.saved()
    return {part: file.read(part) for part in file.digests}


def files(folder: Path) -> list[str]:
    """What has left memory: RUN.PART of each."""
    return sorted(file.stem for file in folder.glob("*/*.row"))


def test_the_run_idle_for_longest_leaves(qwen3_folder: Path, tmp_path: Path) -> None:
    engine = make_engine(qwen3_folder, row_memory_bytes=3 * 8 * PART_BYTES, row_folder=tmp_path)
    first, second, _ = (EngineRun(engine, name, REQUESTS[1]) for name in ("a", "b", "c"))
    first.export(False)
    EngineRun(engine, "d", REQUESTS[1])
    assert files(tmp_path) == ["b.weights"]
    second.export(False)
    assert files(tmp_path) == ["c.weights"]


def test_moments_leave_first_and_are_away_between_steps(qwen3_folder: Path, tmp_path: Path) -> None:
    signs: list[None] = []
    engines = (
        make_engine(
            qwen3_folder,
            row_memory_bytes=6 * 8 * PART_BYTES,
            row_folder=tmp_path,
            progress=lambda: signs.append(None),
        ),
        make_engine(qwen3_folder),
    )
    paged, resident = (
        [EngineRun(engine, name, REQUESTS[1], random=1) for name in "ab"] for engine in engines
    )
    for run in (*paged, *resident):
        for seed in range(3):
            run.compute(run.tile(make_documents(seed, (7,)), CrossEntropy()))
        run.step(PARAMS)
    moments = ["a.exp_avg", "a.exp_avg_sq"]
    assert files(tmp_path) == moments

    signs.clear()
    for seed in range(2):  # fewer: no step is expected
        for run in (*paged, *resident):
            run.compute(run.tile(make_documents(seed, (7,)), CrossEntropy()))
            run.export(False)
    assert files(tmp_path) == moments  # and nothing was moved
    assert not signs
    saved = [saved_vectors(run) for run in (paged[0], resident[0])]
    assert saved[0].keys() == saved[1].keys() == set(Part)
    assert all(np.array_equal(saved[0][part], saved[1][part]) for part in Part)
    assert files(tmp_path) == moments  # a copy was made where they are

    for ours, theirs in zip(paged, resident, strict=True):
        assert ours.step(PARAMS) == theirs.step(PARAMS)
        assert equal(ours.export(), theirs.export())
    assert files(tmp_path) != moments


def test_a_row_larger_than_all_memory_for_rows_is_served(qwen3_folder: Path) -> None:
    engine = make_engine(qwen3_folder, row_memory_bytes=1)
    runs = make_runs(engine)
    tiles = [run.tile(make_documents(1, (4,)), CrossEntropy()) for run in runs]
    assert not any(result.error for result in run_plan(engine, *tiles))
    assert all(run.step(PARAMS).grad_norm > 0 for run in runs)
    assert engine.row_counts().device == 1


def test_a_deleted_run_leaves_nothing(qwen3_folder: Path, tmp_path: Path) -> None:
    engine = make_engine(qwen3_folder, row_memory_bytes=1, row_folder=tmp_path)
    (folder,) = tmp_path.iterdir()
    make_runs(engine)
    assert len(list(folder.iterdir())) == len(REQUESTS) - 1

    for i in range(len(REQUESTS)):
        engine.run(DropRow(f"run{i}"))

    assert not list(folder.iterdir())
    counts = engine.row_counts()
    assert (counts.device, counts.host, counts.disk) == (0, 0, 0)

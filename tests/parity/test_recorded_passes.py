"""Passes over static tensors, as a GPU records them, against the ordinary ones. Here they run
without being recorded: in plain torch, and once in interpreted kernels.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mint_core.lora.spec import AdapterArrays, LoraRequest
from mint_core.model.recordings import Recorder
from tests.engines_in_process import (
    EngineRun,
    for_loss,
    make_documents,
    make_engine,
    run_plan,
    wide_documents,
)
from tests.families import named
from tests.launches import Launches
from tests.models import tiny_qwen3
from tests.recorders import NoRoom, PlainRecorder
from trainer_service.engine.engine import Engine
from trainer_service.engine.memory import measure
from trainer_service.engine.recorded.passes import RECORDED, RecordedPasses
from trainer_service.engine.recorded.shapes import DOCUMENTS, TOKENS, most_recorded_tokens
from trainer_service.jobs import (
    Cispo,
    CrossEntropy,
    Dro,
    Gspo,
    ImportanceSampling,
    Loss,
    Ppo,
    TileResult,
)

LOSSES: tuple[Loss, ...] = (
    CrossEntropy(),
    ImportanceSampling(),
    Ppo(),
    Cispo(),
    Dro(0.3),
    Gspo(0.9, 1.1),
)
REQUESTS = (
    LoraRequest(rank=8, seed=1),
    LoraRequest(rank=3, seed=2, train_mlp=False, train_unembed=False),
    LoraRequest(rank=16, seed=3),
    LoraRequest(rank=5, seed=4, train_attn=False),
    LoraRequest(rank=40, seed=5),
    LoraRequest(rank=8, seed=6),
)


def recording(folder: Path, recorder: Recorder | None = None, most: int = TOKENS[-1]) -> Engine:
    """An engine with what one on a GPU has."""
    engine = make_engine(folder)
    engine.recorded = RecordedPasses(engine.base, most, recorder or PlainRecorder())
    return engine


def counts(engine: Engine) -> dict[str, int]:
    assert engine.recorded is not None
    return dict(engine.counts().passes)


def of_all_losses(engine: Engine) -> tuple[list[AdapterArrays], list[TileResult]]:
    """Gradients and results of runs of different ranks, modules, losses and lengths in one pass,
    one of which only goes forward, and one has a second tile.
    """
    runs = [EngineRun(engine, f"r{i}", asked, random=i + 1) for i, asked in enumerate(REQUESTS)]
    lengths = [(3, 5 + i, 7)[i % 2 :] for i in range(len(runs))]
    lengths[2] = (3, 7, 26)  # more rows than a tile of the kernels
    tiles = [
        run.tile(for_loss(make_documents(i, own), loss), loss, backward=i != 4, weighted=i % 2 == 1)
        for i, (run, loss, own) in enumerate(zip(runs, LOSSES, lengths, strict=True))
    ]
    tiles.append(runs[0].tile(make_documents(9, (1,)), CrossEntropy()))
    results = run_plan(engine, *tiles)
    return [run.gradient() for run in runs if run is not runs[4]], list(results)


def assert_near(
    ours: tuple[list[AdapterArrays], list[TileResult]],
    expected: tuple[list[AdapterArrays], list[TileResult]],
    tolerance: float = 1e-5,
) -> None:
    for own, theirs in zip(ours[0], expected[0], strict=True):
        for name, matrix in theirs.items():
            difference = np.linalg.norm(own[name] - matrix)
            assert difference <= tolerance * max(1e-2, np.linalg.norm(matrix)), name
    for result, other in zip(ours[1], expected[1], strict=True):
        assert result.error is None
        for logprobs, same in zip(result.logprobs, other.logprobs, strict=True):
            np.testing.assert_allclose(logprobs, same, atol=1e-5)
        assert result.metrics.keys() == other.metrics.keys()
        for name, value in other.metrics.items():
            assert result.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_runs_of_all_kinds_get_what_an_ordinary_pass_gives_them(qwen3_folder: Path) -> None:
    engine = recording(qwen3_folder)
    assert_near(of_all_losses(engine), of_all_losses(make_engine(qwen3_folder)))
    assert counts(engine) == {RECORDED: 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py does this with graphs")
def test_the_kernels_read_the_tables_of_a_recorded_pass(tmp_path: Path) -> None:
    """Of one layer: the interpreter takes seconds for each."""
    interpreted = pytest.importorskip("tests.interpreted_kernels")
    folder = tiny_qwen3(tmp_path, layers=1)
    expected = of_all_losses(make_engine(folder))
    engine = recording(folder)
    with interpreted.in_kernels():
        ours = of_all_losses(engine)
    assert_near(ours, expected, tolerance=3e-5)


def one_run(engine: Engine, others: Sequence[int]) -> list[NDArray[np.float32]]:
    """Logprobs and gradient of a run beside others, each with a document of so many tokens."""
    run = EngineRun(engine, "r", LoraRequest(rank=8, seed=1), random=1)
    neighbours = [
        EngineRun(engine, f"n{i}", LoraRequest(rank=16, seed=i), random=i)
        for i in range(len(others))
    ]
    tiles = [
        neighbour.tile(make_documents(n, (n,)), CrossEntropy())
        for neighbour, n in zip(neighbours, others, strict=True)
    ]
    own = run.tile(make_documents(1, (17, 4, 9)), Ppo())
    result = run_plan(engine, *tiles, own)[-1]
    return [*result.logprobs, *run.gradient().values()]


def test_neither_neighbours_nor_what_fills_up_change_a_bit(qwen3_folder: Path) -> None:
    many = ((), (40,), (5, 200, 31), (20,) * 9)
    seen = [one_run(recording(qwen3_folder), others) for others in many]
    for ours in seen[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(ours, seen[0], strict=True))


def test_tenants_ranks_and_losses_are_data_of_one_graph(qwen3_folder: Path) -> None:
    recorder = PlainRecorder()
    engine = recording(qwen3_folder, recorder)
    expected = make_engine(qwen3_folder)
    for step, loss in enumerate(LOSSES):
        both = []
        for each in (engine, expected):
            runs = [
                EngineRun(each, f"{step}-{i}", LoraRequest(rank=4 + 8 * (step % 2)), random=i)
                for i in range(1 + step % 4)
            ]
            tiles = [
                run.tile(for_loss(make_documents(i, (4 + step,)), loss), loss)
                for i, run in enumerate(runs)
            ]
            results = run_plan(each, *tiles)
            both.append(([run.gradient() for run in runs], list(results)))
        assert_near(both[0], both[1])
    assert recorder.replays == len(LOSSES) - 2  # of one tile and of several, each came once
    assert counts(engine) == {RECORDED: len(LOSSES)}


def test_a_recorded_pass_is_one_launch(tmp_path: Path) -> None:
    """Beside a copy of what it reads."""
    launches = Launches()
    engine = recording(tiny_qwen3(tmp_path), PlainRecorder(partial(launches.as_one, "graph")))
    runs = [EngineRun(engine, f"r{i}", LoraRequest(rank=8 * (i % 2 + 1))) for i in range(8)]
    for _ in range(2):  # of which the first is not recorded
        launches.counts.clear()
        tiles = [run.tile(make_documents(1, (8,)), CrossEntropy()) for run in runs]
        with launches:
            run_plan(engine, *tiles)
    assert launches.counts == {"copy_": 1, "graph": 1}


@pytest.mark.parametrize(
    ("lengths", "changes", "reason"),
    [
        ((300,), {}, "too_long"),
        ((1,) * (DOCUMENTS[-1] + 1), {"most": 1024}, "too_many"),
        ((9,), {"isolated": True}, "isolated"),
        ((9,), {"targets": 3}, "targets"),
    ],
)
def test_what_no_recorded_pass_takes_is_counted_and_computed(
    qwen3_folder: Path, lengths: Sequence[int], changes: dict[str, int], reason: str
) -> None:
    engine = recording(qwen3_folder, most=changes.get("most", 256))
    both = []
    for each in (engine, make_engine(qwen3_folder)):
        run = EngineRun(each, "r", LoraRequest(rank=8), random=1)
        documents = make_documents(1, lengths)
        if "targets" in changes:
            documents = wide_documents(1, lengths, changes["targets"])
        result = run.compute(run.tile(documents, CrossEntropy(), isolated="isolated" in changes))
        both.append(([run.gradient()], [result]))
    assert_near(both[0], both[1], tolerance=0.0)
    assert counts(engine) == {reason: 1}


@pytest.mark.parametrize(
    ("family", "reason"), [("Qwen 3 MoE", "experts"), ("LFM2", "model"), ("Gemma 2", "model")]
)
def test_models_that_cannot_be_recorded_are_computed_as_before(
    family: str, reason: str, tmp_path: Path
) -> None:
    engine = recording(named(family).make(tmp_path))
    request = LoraRequest(rank=8, train_mlp=reason != "experts")
    run = EngineRun(engine, "r", request, random=1)
    result = run.compute(run.tile(make_documents(1, (9, 4)), CrossEntropy()))
    assert result.error is None
    assert counts(engine) == {reason: 1}


def test_without_memory_for_graphs_passes_are_computed_as_before(qwen3_folder: Path) -> None:
    engine = recording(qwen3_folder, NoRoom())
    both = []
    for each in (engine, make_engine(qwen3_folder)):
        run = EngineRun(each, "r", LoraRequest(rank=8), random=1)
        documents = make_documents(1, (9, 70))
        results = [run.compute(run.tile(documents, CrossEntropy())) for _ in range(3)]
        both.append(([run.gradient()], results))
    assert_near(both[0], both[1])
    # 128 tokens are not tried again, smaller passes would be.
    assert counts(engine) == {RECORDED: 1, "memory": 1, "too_long": 1}


def test_a_run_that_is_not_finite_reaches_its_own_row_alone(qwen3_folder: Path) -> None:
    engine = recording(qwen3_folder)
    good, bad = (EngineRun(engine, name, LoraRequest(rank=8), random=1) for name in ("good", "bad"))
    documents = for_loss(make_documents(1, (9,)), Gspo())
    huge = [replace(d, advantages=np.full(9, 3e38, np.float32)) for d in documents]
    results = run_plan(engine, bad.tile(huge, Gspo()), good.tile(documents, Gspo()))
    assert results[0].error is not None
    assert results[1].error is None
    assert all(np.isfinite(matrix).all() for matrix in good.gradient().values())


def test_the_longest_pass_follows_from_memory(qwen3_folder: Path) -> None:
    memory = measure(make_engine(qwen3_folder).base, 32)
    assert most_recorded_tokens(memory, 0) == 0
    assert most_recorded_tokens(memory, 2**60) == TOKENS[-1]
    budgets = [2**power for power in range(20, 40)]
    sizes = [most_recorded_tokens(memory, budget) for budget in budgets]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3

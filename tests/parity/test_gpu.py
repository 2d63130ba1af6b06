"""The same engine on an accelerator, against the CPU in float32. Needs a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mint_core.lora.spec import LoraRequest
from tests.engines_in_process import EngineRun, RowArrays, make_documents, make_engine, run_plan
from trainer_service.jobs import AdamParams, CrossEntropy, Dro, Plan, Ppo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_gpu_gradients_and_steps_are_near_the_cpus(
    qwen3_folder: Path, dtype: str, tolerance: float
) -> None:
    documents = make_documents(1, (5, 64, 17))
    gradients, exports = [], []
    for device, kind in (("cpu", "float32"), ("cuda", dtype)):
        engine = make_engine(qwen3_folder, device=device, dtype=kind)
        run = EngineRun(engine, "r", LoraRequest(rank=8, seed=1), random=2)
        run.compute(run.tile(documents, CrossEntropy()))
        gradients.append(run.gradient())
        run.step(AdamParams(learning_rate=1e-3))
        exports.append(run.export().weights)
    for cpu, gpu in (gradients, exports):
        for name, expected in cpu.items():
            assert np.linalg.norm(gpu[name] - expected) <= tolerance * np.linalg.norm(expected)


def test_recorded_passes_give_what_launched_ones_do(qwen3_folder: Path) -> None:
    """As it is, recorded, and replayed with other tenants, ranks, lengths and losses."""
    recorded = make_engine(qwen3_folder, device="cuda", dtype="bfloat16")
    launched = make_engine(qwen3_folder, device="cuda", dtype="bfloat16")
    launched.recorded = None
    for step in range(6):
        gradients = []
        for engine in (recorded, launched):
            runs = [
                EngineRun(engine, f"{step}-{i}", LoraRequest(rank=8 * (1 + i % 2)), random=i + 1)
                for i in range(2 + step % 3)
            ]
            losses = (CrossEntropy(), Ppo(), Dro(0.1))
            tiles = [
                run.tile(make_documents(step + i, (9, 17 + step)), losses[i % 3])
                for i, run in enumerate(runs)
            ]
            assert all(result.error is None for result in run_plan(engine, *tiles))
            gradients.append([run.gradient() for run in runs])
        for ours, theirs in zip(*gradients, strict=True):
            for name, expected in theirs.items():
                assert np.linalg.norm(ours[name] - expected) <= 2e-2 * np.linalg.norm(expected)
    assert recorded.counts().passes == {"recorded": 6}


def test_what_no_graph_takes_is_launched(qwen3_folder: Path) -> None:
    engine = make_engine(qwen3_folder, device="cuda", dtype="float32")
    run = EngineRun(engine, "r", LoraRequest(rank=8), random=1)
    for _ in range(3):
        result = run.compute(run.tile(make_documents(1, (9,)), CrossEntropy()))
        assert result.error is None
    assert engine.counts().passes == {"model": 3}  # no kernel for documents of float32


def test_an_isolated_run_repeats_bitwise_beside_whatever_else_runs(qwen3_folder: Path) -> None:
    engine = make_engine(qwen3_folder, device="cuda", dtype="bfloat16")
    exports: list[RowArrays] = []
    for attempt in range(2):
        run = EngineRun(engine, f"run{attempt}", LoraRequest(rank=8, seed=1), random=2)
        other = EngineRun(engine, f"other{attempt}", LoraRequest(rank=16, seed=2), random=3)
        for step in range(3):
            documents = make_documents(step, (40 + attempt, 1200))
            other.compute(other.tile(documents, CrossEntropy()))
            run.compute(
                run.tile(make_documents(step, (300, 17, 1100)), CrossEntropy(), isolated=True)
            )
            run.step(AdamParams(learning_rate=1e-2))
        exports.append(run.export())
    for name, expected in exports[0].weights.items():
        assert np.array_equal(exports[1].weights[name], expected)


def test_rows_that_leave_the_gpu_come_back_as_they_were(qwen3_folder: Path) -> None:
    """Through host memory, which holds two of the rows, and files."""
    names = [f"r{i}" for i in range(5)]
    part_bytes = 4 * 8 * 2624
    ends: list[list[RowArrays]] = []
    for limit in (0, 4 * part_bytes):
        engine = make_engine(
            qwen3_folder,
            device="cuda",
            dtype="float32",
            row_memory_bytes=limit,
            host_row_memory_bytes=2 * 4 * part_bytes,
        )
        runs = [EngineRun(engine, n, LoraRequest(rank=8, seed=1), random=2) for n in names]
        for step in range(3):  # one run at a time: what shares a pass differs in the last bits
            for run in runs:
                run.compute(run.tile(make_documents(step, (9, 4)), CrossEntropy()))
            for run in runs:
                run.step(AdamParams(learning_rate=1e-3))
        counts = engine.row_counts()
        assert (counts.host, counts.disk) == ((2, 2) if limit else (0, 0))
        ends.append([run.export() for run in runs])
    for ours, theirs in zip(*ends, strict=True):
        for name, expected in theirs.weights.items():
            # The kernels themselves may add in another order from one run to the next.
            np.testing.assert_allclose(ours.weights[name], expected, rtol=1e-5, atol=1e-6)


def test_rows_that_come_ahead_are_what_they_were(qwen3_folder: Path) -> None:
    """From page-locked memory, while others are computed; on a CPU: test_rows_ahead.py."""
    part_bytes = 4 * 8 * 2624
    engine = make_engine(
        qwen3_folder,
        device="cuda",
        dtype="float32",
        row_memory_bytes=4 * part_bytes,
        host_row_memory_bytes=40 * part_bytes,
    )
    runs = [EngineRun(engine, f"r{i}", LoraRequest(rank=8, seed=1), random=i) for i in range(5)]
    for run in runs:
        run.compute(run.tile(make_documents(1, (9, 4)), CrossEntropy()))
        run.step(AdamParams(learning_rate=1e-3))

    def vectors() -> list[dict[str, bytes]]:
        saved = [run.saved() for run in runs]
        return [{part: file.read(part).tobytes() for part in file.digests} for file in saved]

    assert all(each.is_pinned() for each in engine._rows._host._parts.values())
    before, counts = vectors(), dict(engine.counts().fetches)
    for turn in range(20):
        run, following = runs[turn % 5], runs[(turn + 1) % 5]
        tile = run.tile(make_documents(turn, (9,)), CrossEntropy(), backward=False)
        engine.run(Plan((tile,), (following.name,)))
    assert vectors() == before
    found = engine.counts().fetches
    assert found.get("early", 0) + found.get("late", 0) >= counts.get("early", 0) + 10
    assert found.get("asked", 0) <= counts.get("asked", 0) + 1

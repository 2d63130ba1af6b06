"""Rows that the engine writes: restored to the bit or refused by name, and mapped by samplers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from checkpoint_store import Manifest, WeightsNotFinite, new_manifest, open_row
from checkpoint_store.row_file import RowFile, write_row
from mint_core.lora.spec import LoraRequest
from tests.engines_in_process import (
    EngineRun,
    RowArrays,
    make_documents,
    make_engine,
    manifest_of,
    save,
)
from trainer_service.engine import digests, saving
from trainer_service.engine.engine import Engine
from trainer_service.errors import RowNotSaved, StateDamaged
from trainer_service.jobs import (
    AdamParams,
    CrossEntropy,
    DropRow,
    RestoreRow,
    SaveCheckpoint,
    SavedRow,
    SaveRow,
    WriteRow,
)

RUN = "r-1"
SAVE = SaveRow(training_run_id=RUN, sequence=5, optional=True)
FILE = "r-1-5.safetensors"


@pytest.fixture
def engine(qwen3_folder: Path, tmp_path: Path) -> Engine:
    return make_engine(qwen3_folder, saved_row_folder=tmp_path)


@pytest.fixture
def run(engine: Engine) -> EngineRun:
    """Two steps taken, and a gradient for the next."""
    run = EngineRun(engine, RUN, LoraRequest(rank=8), random=1)
    for seed in (1, 2, 3):
        run.compute(run.tile(make_documents(seed, (7,)), CrossEntropy()))
        if seed < 3:
            run.step(AdamParams(learning_rate=1e-2))
    return run


def restore(engine: Engine, run: EngineRun, file: str = FILE) -> object:
    engine.run(DropRow(RUN))
    return engine.run(RestoreRow(RUN, run.spec, file))


def changed(path: Path, about: dict[str, str], keep: Callable[[str], bool] = bool) -> None:
    """Writes a file anew that tells of itself something else, with its numbers as they were."""
    row = RowFile.open(path)
    told = {name: value for name, value in (dict(row.about) | about).items() if keep(name)}
    write_row(path, {part: row.read(part) for part in row.digests}, told)


def test_what_was_saved_is_restored(engine: Engine, run: EngineRun, tmp_path: Path) -> None:
    before = run.export()
    signs: list[None] = []
    rest = engine.run(SAVE)
    run.load(RowArrays(weights=before.weights))  # the row may change before it is written
    assert callable(rest)
    written = rest(lambda: signs.append(None))

    assert written == SavedRow(5, FILE, (tmp_path / FILE).stat().st_size)
    assert len(signs) == 2 * 4  # a digest of each part, and each part in one piece
    assert restore(engine, run) == ""
    after = run.export()
    for ours, theirs in (
        (after.weights, before.weights),
        (after.exp_avg, before.exp_avg),
        (after.exp_avg_sq, before.exp_avg_sq),
    ):
        assert ours is not None
        assert theirs is not None
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    stepped = run.step(AdamParams(learning_rate=1e-2))
    assert stepped.grad_norm > 0  # the gradient came too
    assert stepped.step == 3


def test_a_file_of_before_layouts_were_told_is_restored(
    engine: Engine, run: EngineRun, tmp_path: Path
) -> None:
    save(engine, SAVE)
    changed(tmp_path / FILE, {}, keep=lambda name: name != "layout")
    assert restore(engine, run) == ""


def test_a_row_that_lies_otherwise_is_refused(
    engine: Engine, run: EngineRun, tmp_path: Path
) -> None:
    save(engine, SAVE)
    layout = RowFile.open(tmp_path / FILE).about["layout"]
    changed(tmp_path / FILE, {"layout": layout.replace("[[0,", "[[8,")})
    with pytest.raises(StateDamaged, match=f"row file {FILE} lies otherwise in memory"):
        restore(engine, run)
    assert engine.row_counts().device == 0


def test_a_damaged_row_is_refused_by_its_file(
    engine: Engine, run: EngineRun, tmp_path: Path
) -> None:
    save(engine, SAVE)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(StateDamaged, match=f"row file {FILE} has damaged"):
        restore(engine, run)
    with pytest.raises(StateDamaged, match="row file none is not there"):
        restore(engine, run, "none")
    assert engine.row_counts().device == 0


@pytest.mark.usefixtures("run")
def test_a_row_that_cannot_be_written_says_so(engine: Engine, tmp_path: Path) -> None:
    tmp_path.rename(moved := tmp_path.with_name("moved"))
    with pytest.raises(RowNotSaved, match="No such file"):
        save(engine, SAVE)
    moved.rename(tmp_path)
    assert not list(tmp_path.iterdir())


class Published:
    """Has files for samplers written, and checks each by its digest and by the run's weights."""

    def __init__(self, engine: Engine, run: EngineRun, folder: Path) -> None:
        self._engine, self._run, self._folder = engine, run, folder
        self.taken = 0  # digests

    def digest(self, vector: Tensor) -> int:
        self.taken += 1
        return digests.digest(vector)

    def write(self) -> int:
        """How many digests were taken for it."""
        model, before = self._engine.description, self.taken
        manifest = new_manifest(
            None,
            Manifest(
                training_run_id=RUN,
                kind="sampler_weights",
                tenant="t",
                base_model=model.name,
                base_fingerprint=model.fingerprint,
                spec=self._run.spec,
                step=2,
            ),
        )
        file = self._folder / manifest.name
        self._engine.run(WriteRow(str(file), manifest))
        taken = self.taken - before
        row = open_row(file, str(manifest.revision_path))
        assert row.manifest == manifest
        weights, expected = row.weights(), self._run.export(False).weights
        assert weights.keys() == expected.keys()
        assert all(np.array_equal(weights[name], expected[name]) for name in expected)
        return taken


def test_the_digest_of_a_step_serves_until_weights_change(
    engine: Engine, run: EngineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Published(engine, run, tmp_path)
    monkeypatch.setattr(saving, "digest", published.digest)
    assert published.write() == 0
    (document,) = make_documents(1, (7,))
    endless = replace(document, weights=np.full(7, np.inf, np.float32))
    run.compute(run.tile([endless], CrossEntropy()))
    assert run.step(AdamParams(learning_rate=1e-2)).error is not None
    assert published.write() == 0

    before = run.export()
    for start in (RowArrays(weights=before.weights), before):
        run.load(start)
        assert [published.write() for _ in range(2)] == [1, 0]
    save(engine, SAVE)
    restore(engine, run)
    assert published.write() == 1
    run.compute(run.tile(make_documents(4, (7,)), CrossEntropy()))
    run.step(AdamParams(learning_rate=1e-2))
    assert published.write() == 0


def test_no_checkpoint_is_written_of_what_is_not_finite(
    engine: Engine, run: EngineRun, tmp_path: Path
) -> None:
    assert run.step(AdamParams(learning_rate=3e38, weight_decay=1e3), replayed=True).error is None
    for with_optimizer in (False, True):
        job = SaveCheckpoint(
            manifest=manifest_of(RUN, run.spec),
            folder=str(tmp_path),
            with_optimizer=with_optimizer,
        )
        with pytest.raises(WeightsNotFinite):
            save(engine, job)
    with pytest.raises(WeightsNotFinite, match="lora_"):  # what samplers map
        engine.run(WriteRow(str(tmp_path / "row"), manifest_of(RUN, run.spec)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["weights", "exp_avg", "exp_avg_sq"])
def test_no_row_is_filled_with_what_is_not_finite(run: EngineRun, part: str) -> None:
    before = run.export()
    arrays = {name: array.copy() for name, array in getattr(before, part).items()}
    name = sorted(arrays)[0]
    arrays[name][-1, -1] = np.inf
    with pytest.raises(WeightsNotFinite) as caught:
        run.load(replace(before, **{part: arrays}))
    assert caught.value.metadata["tensor"] == name

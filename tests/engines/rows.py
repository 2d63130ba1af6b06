"""A trainer's engine with rows and no model: sums of floats in which every bit and the order of all
that was added shows. `python -m tests.engines.rows FD`. It starts in a fraction of a second.

A document with the token POISON ends it. While the model's folder holds a file of the name HELD it
does not get ready, and while it holds one of the name BROKEN it cannot start.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_store import FileEntry, Manifest, open_row, write_published_row
from checkpoint_store.adapter_files import read_weights, write_files
from checkpoint_store.errors import full_disk_told
from checkpoint_store.row_file import RowFile, save_row
from mint_core.engine_host.pipe import Hello, Part, Reply, connect
from mint_core.errors import EngineFault, FailedPrecondition, MintError
from mint_core.fault_points import fault_point
from mint_core.lora.row_layout import Matrix, RowLayout
from mint_core.lora.spec import AdapterArrays, AdapterSpec, LoraRequest, lora_a_name, lora_b_name
from tests.engines.echo_jobs import MODEL
from trainer_service.errors import LossNotFinite, RowNotSaved
from trainer_service.jobs import (
    ClearGradient,
    CreateRow,
    DropRow,
    Floats,
    LoadRow,
    Plan,
    RestoreRow,
    RowDescription,
    SaveCheckpoint,
    SavedRow,
    SaveRow,
    Source,
    StepResult,
    StepRow,
    StepRows,
    StoreRow,
    Tile,
    TileResult,
    WriteRow,
    saved_row_name,
)

MODULE = "lm_head"
WIDTH = 16
MAX_BATCH_TOKENS = 64
LAYOUT = RowLayout.of(
    2 * WIDTH, {MODULE: (Matrix(0, 1, WIDTH, WIDTH, 1), Matrix(WIDTH, WIDTH, 1, 1, 1))}
)
POISON = 13  # a token
HELD = "held"
BROKEN = "broken"
DIFFERENT = "MINT_TEST_OTHER_BITS"  # set in an engine's environment, its steps differ in a bit
UNLUCKY = (
    "MINT_TEST_UNLUCKY"  # set there, rows of UNLUCKY_SEED find no memory when restored, or fail
)
UNLUCKY_SEED = 13
NOT_FINITE = "MINT_TEST_NOT_FINITE"  # set there, what a tile comes to is not, and is added


@dataclass
class Row:
    spec: AdapterSpec
    weights: Floats
    gradient: Floats = field(default_factory=lambda: np.zeros(WIDTH, np.float32))
    step: int = 0

    def add(self, tokens: np.ndarray, weights: Floats) -> None:
        for token, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
            place = self.weights * np.float32(0.7) + np.float32(token / 64)
            self.gradient += np.float32(weight) * (place - np.floor(place))


class Rows:
    def __init__(self, pipe: Any, saved_rows: Path, traits: str) -> None:
        self._pipe = pipe
        self._traits = traits
        self._saved_rows = saved_rows
        self._rows: dict[str, Row] = {}
        self._handlers: Mapping[type, Callable[[Any], object]] = {
            Plan: lambda job: tuple(self._tile(tile) for tile in job.tiles),
            StepRows: lambda job: tuple(self._step(step) for step in job.steps),
            CreateRow: self._create,
            DropRow: lambda job: self._rows.pop(job.training_run_id, None) and None,
            ClearGradient: self._clear,
            WriteRow: self._write,
            SaveCheckpoint: self._save,
            StoreRow: self._store,
            LoadRow: self._load,
            SaveRow: self._save_row,
            RestoreRow: self._restore,
        }

    def serve(self) -> None:
        while (call := self._pipe.receive()) is not None:
            self._number = call.number
            try:
                answer = self._handlers[type(call.job)](call.job)
            except MintError as error:
                self._pipe.fail(call.number, error)
                continue
            fault_point(f"engine:after-{type(call.job).__name__}")
            self._pipe.send(Reply(call.number, answer))

    def _tile(self, tile: Tile) -> TileResult:
        row = self._rows[tile.training_run_id]
        logprobs = []
        for document in tile.documents:
            if POISON in document.tokens:
                os._exit(9)
            each = np.float32(row.weights.sum()) - document.tokens.astype(np.float32)
            logprobs.append(
                np.broadcast_to(
                    each.reshape(-1, *[1] * len(document.width)), document.targets.shape
                )
            )
            if tile.backward:
                weights = document.weights.reshape(len(document.tokens), -1)
                row.add(document.tokens, weights.sum(axis=1))
        if NOT_FINITE in os.environ:
            return TileResult(error=LossNotFinite("the loss"))
        total = float(sum(float(each.sum()) for each in logprobs))
        return TileResult(logprobs=tuple(logprobs), metrics={"loss:sum": total})

    def _step(self, job: StepRow) -> StepResult:
        row = self._rows[job.training_run_id]
        row.weights = row.weights - np.float32(job.adam_params.learning_rate) * row.gradient
        if DIFFERENT in os.environ:
            row.weights[0] = np.nextafter(row.weights[0], np.float32(9))
        norm = float(np.abs(row.gradient).sum())
        row.gradient[:] = 0
        row.step += 1
        return StepResult(step=row.step, grad_norm=norm, weight_digest=digest(row.weights))

    def _create(self, job: CreateRow) -> RowDescription:
        spec = resolve(job.request) if isinstance(job.request, LoraRequest) else job.request
        spec = spec.spec if isinstance(spec, Source) else spec
        weights = np.random.default_rng(spec.seed).random(WIDTH, np.float32)
        self._rows[job.training_run_id] = Row(spec, weights)
        if isinstance(job.request, Source):
            self._fill(job.training_run_id, job.request)
        return RowDescription(spec=spec, trainable_parameter_count=WIDTH, row_bytes=4 * LAYOUT.size)

    def _clear(self, job: ClearGradient) -> None:
        self._rows[job.training_run_id].gradient[:] = 0

    def _save(self, job: SaveCheckpoint) -> Mapping[str, FileEntry]:
        weights = arrays(self._rows[job.manifest.training_run_id].weights)
        return self._files(job.folder, job.manifest, weights, with_optimizer=job.with_optimizer)

    def _store(self, job: StoreRow) -> Mapping[str, FileEntry]:
        weights = open_row(Path(job.file), str(job.manifest.revision_path)).weights()
        return self._files(job.folder, job.manifest, weights)

    def _files(
        self,
        folder: str,
        manifest: Manifest,
        weights: AdapterArrays,
        *,
        with_optimizer: bool = False,
    ) -> Mapping[str, FileEntry]:
        self._pipe.send(Part(self._number, None))
        moments = arrays(np.zeros(WIDTH, np.float32))
        with full_disk_told():
            return write_files(
                Path(folder),
                weights,
                (moments, moments) if with_optimizer else None,
                spec=manifest.spec,
                base_model=manifest.base_model,
                base_fingerprint=manifest.base_fingerprint,
                step=manifest.step,
            )

    def _write(self, job: WriteRow) -> None:
        row = self._rows[job.manifest.training_run_id]
        numbers = LAYOUT.row(row.spec, arrays(row.weights))
        write_published_row(Path(job.file), numbers, LAYOUT, job.manifest)

    def _load(self, job: LoadRow) -> None:
        self._clear(ClearGradient(job.training_run_id))
        self._fill(job.training_run_id, job.source)

    def _fill(self, name: str, source: Source) -> None:
        row = self._rows[name]
        if source.row_file:
            weights = open_row(Path(source.row_file), source.revision_path).weights()
        else:
            weights = read_weights(Path(source.folder))
        row.weights = weights[lora_a_name(MODULE)][0].copy()
        row.step = source.step

    def _save_row(self, job: SaveRow) -> SavedRow:
        row = self._rows[job.training_run_id]
        self._pipe.send(Part(self._number, None))
        parts = {"weights": row.weights, "gradient": row.gradient}
        about = {"step": str(row.step), "traits": self._traits}
        name = saved_row_name(job.training_run_id, job.sequence)
        try:
            size_bytes = save_row(self._saved_rows / name, parts, about)
        except OSError as error:
            raise RowNotSaved(error) from error
        return SavedRow(job.sequence, name, size_bytes)

    def _restore(self, job: RestoreRow) -> str:
        if UNLUCKY in os.environ and job.spec.seed == UNLUCKY_SEED:
            raise EngineFault("odd") if os.environ[UNLUCKY] == "odd" else MemoryError
        file = RowFile.open(self._saved_rows / job.file)
        weights, gradient = file.read("weights"), file.read("gradient")
        step = int(file.about["step"])
        self._rows[job.training_run_id] = Row(job.spec, weights, gradient, step)
        before = file.about.get("traits", self._traits)
        return "" if before == self._traits else f"device was {before} and is {self._traits}"


def resolve(request: LoraRequest) -> AdapterSpec:
    seed = 1 if request.seed is None else request.seed
    return AdapterSpec(rank=1, alpha=1.0, use_rslora=False, seed=seed, modules=(MODULE,))


def arrays(weights: Floats) -> dict[str, Floats]:
    return {
        lora_a_name(MODULE): weights[None].copy(),
        lora_b_name(MODULE): np.zeros((WIDTH, 1), np.float32),
    }


def digest(vector: Floats) -> int:
    return int.from_bytes(hashlib.blake2b(vector.tobytes(), digest_size=8).digest(), "little")


def main() -> None:
    pipe, config = connect()
    folder = getattr(config, "base_model", ".")
    if Path(folder, BROKEN).exists():
        pipe.fail(0, FailedPrecondition("it is broken"))
        return
    model = replace(MODEL, folder=folder, name="rows", max_lora_rank=128)
    while Path(folder, HELD).exists():
        time.sleep(0.01)  # nothing tells of a file's end
    traits = getattr(config, "device", "")
    most_tokens = getattr(config, "max_batch_tokens", 0) or MAX_BATCH_TOKENS
    pipe.send(Hello(model, most_tokens, traits=traits))
    Rows(pipe, config.saved_row_folder, traits).serve()


if __name__ == "__main__":
    main()

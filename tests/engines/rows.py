"""A trainer's engine with rows and no model: sums of floats in which every bit and the order of all
that was added shows. `python -m tests.engines.rows FD`. It starts in a fraction of a second.

A document with the token POISON ends it. While the model's folder holds a file of the name HELD it
does not get ready.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_store import write_published_row
from checkpoint_store.row_file import RowFile, save_row
from mint_core.engine_host.pipe import Hello, Part, Reply, connect
from mint_core.errors import MintError
from mint_core.fault_points import fault_point
from mint_core.lora.row_layout import Matrix, RowLayout
from mint_core.lora.spec import AdapterSpec, LoraRequest, lora_a_name, lora_b_name
from tests.engines.echo_jobs import MODEL
from trainer_service.errors import SnapshotFailed
from trainer_service.jobs import (
    ClearGradient,
    CreateRow,
    DropRow,
    ExportRow,
    Floats,
    LoadRow,
    Plan,
    RestoredRow,
    RestoreRow,
    RowArrays,
    RowDescription,
    SnapshotCopied,
    SnapshotRow,
    SnapshotWritten,
    StepResult,
    StepRow,
    StepRows,
    Tile,
    TileResult,
    WriteRow,
)

MODULE = "lm_head"
WIDTH = 16
MAX_BATCH_TOKENS = 64
LAYOUT = RowLayout.of(
    2 * WIDTH, {MODULE: (Matrix(0, (1, WIDTH), (WIDTH, 1)), Matrix(WIDTH, (WIDTH, 1), (1, 1)))}
)
POISON = 13  # a token
HELD = "held"
DIFFERENT = "MINT_TEST_OTHER_BITS"  # set in an engine's environment, its steps differ in a bit
UNLUCKY = "MINT_TEST_UNLUCKY"  # set there, rows of UNLUCKY_SEED find no memory when restored
UNLUCKY_SEED = 13


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
    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._rows: dict[str, Row] = {}
        self._handlers: Mapping[type, Callable[[Any], object]] = {
            Plan: lambda job: tuple(self._tile(tile) for tile in job.tiles),
            StepRows: lambda job: tuple(self._step(step) for step in job.steps),
            CreateRow: self._create,
            DropRow: lambda job: self._rows.pop(job.training_run_id, None) and None,
            ClearGradient: self._clear,
            ExportRow: self._export,
            WriteRow: self._write,
            LoadRow: self._load,
            SnapshotRow: self._snapshot,
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
        spec = job.request if isinstance(job.request, AdapterSpec) else resolve(job.request)
        weights = np.random.default_rng(spec.seed).random(WIDTH, np.float32)
        self._rows[job.training_run_id] = Row(spec, weights)
        if job.start is not None:
            self._fill(job.training_run_id, job.start)
        return RowDescription(spec=spec, trainable_parameter_count=WIDTH, row_bytes=4 * LAYOUT.size)

    def _clear(self, job: ClearGradient) -> None:
        self._rows[job.training_run_id].gradient[:] = 0

    def _export(self, job: ExportRow) -> RowArrays:
        row = self._rows[job.training_run_id]
        weights = arrays(row.weights)
        moments = arrays(np.zeros(WIDTH, np.float32)) if job.with_optimizer else None
        return RowArrays(weights=weights, exp_avg=moments, exp_avg_sq=moments, step=row.step)

    def _write(self, job: WriteRow) -> None:
        row = self._rows[job.manifest.training_run_id]
        numbers = LAYOUT.row(row.spec, arrays(row.weights))
        write_published_row(Path(job.file), numbers, LAYOUT, job.manifest)

    def _load(self, job: LoadRow) -> None:
        self._clear(ClearGradient(job.training_run_id))
        self._fill(job.training_run_id, job.start)

    def _fill(self, name: str, start: RowArrays) -> None:
        row = self._rows[name]
        row.weights = start.weights[lora_a_name(MODULE)][0].copy()
        row.step = start.step if start.exp_avg else 0

    def _snapshot(self, job: SnapshotRow) -> SnapshotWritten:
        row = self._rows[job.training_run_id]
        self._pipe.send(Part(self._number, SnapshotCopied()))
        parts = {"weights": row.weights, "gradient": row.gradient}
        about = {"step": str(row.step)}
        try:
            return SnapshotWritten(save_row(Path(job.path), parts, about))
        except OSError as error:
            raise SnapshotFailed(error) from error

    def _restore(self, job: RestoreRow) -> RestoredRow:
        if UNLUCKY in os.environ and job.spec.seed == UNLUCKY_SEED:
            raise MemoryError
        file = RowFile.open(Path(job.path))
        weights, gradient = file.read("weights"), file.read("gradient")
        step = int(file.about["step"])
        self._rows[job.training_run_id] = Row(job.spec, weights, gradient, step)
        return RestoredRow("")


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
    model = replace(MODEL, folder=folder, name="rows", max_lora_rank=128)
    while Path(folder, HELD).exists():
        time.sleep(0.01)  # nothing tells of a file's end
    pipe.send(Hello(model, MAX_BATCH_TOKENS))
    Rows(pipe).serve()


if __name__ == "__main__":
    main()

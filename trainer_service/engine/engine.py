"""The engine: rows of adapters on one base model, and the jobs done on them."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoint_store.row_file import RowDamaged, RowFile
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import InvalidRequest, MintError
from mint_core.lora.bank import TRAINING_PARTS, Part
from mint_core.lora.spec import AdapterSpec, LoraRequest
from mint_core.lora.targets import initial_arrays, resolve
from mint_core.model.loading import LoadedBase, load_base
from trainer_service.engine.digests import digest
from trainer_service.engine.memory import budget_bytes, lengths, measure
from trainer_service.engine.optimizer import RowStep, step_rows
from trainer_service.engine.packing import pack
from trainer_service.engine.row_files import RowFiles
from trainer_service.engine.rows import (
    Rows,
    Span,
    Want,
    device_limit_bytes,
    host_limit_bytes,
)
from trainer_service.engine.snapshots import RowCopy, copy_row, difference, read_row, write_weights
from trainer_service.engine.training_pass import run_pass
from trainer_service.errors import StateDamaged
from trainer_service.jobs import (
    ClearGradient,
    CreateRow,
    DropRow,
    EngineConfig,
    ExportRow,
    LoadRow,
    Plan,
    RestoredRow,
    RestoreRow,
    RowArrays,
    RowCounts,
    RowDescription,
    SnapshotRow,
    StepResult,
    StepRow,
    StepRows,
    Tile,
    TileResult,
    WriteRow,
)

logger = logging.getLogger(__name__)

MOMENTS = (Part.EXP_AVG, Part.EXP_AVG_SQ)


class Engine:
    """Holds the rows of all runs. One thread; `run` does one job at a time."""

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[], None] = lambda: None,  # called now and then during long jobs
    ) -> None:
        # cuBLAS is deterministic only with a workspace of its own per stream, set before it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.base: LoadedBase = load_base(
            config.base_model,
            name=config.base_model_name,
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            max_lora_rank=config.max_lora_rank,
        )
        self._bank = self.base.new_bank(TRAINING_PARTS)
        self._progress = progress
        device = self.base.device
        self._rows = Rows(
            config.row_memory_bytes or device_limit_bytes(device),
            host_limit_bytes=config.host_row_memory_bytes or host_limit_bytes(device),
            files=RowFiles(Path(config.row_folder), progress),
            progress=progress,
        )
        memory = measure(self.base, config.max_lora_rank)
        self.lengths = lengths(memory, budget_bytes(device), device.type)
        self.max_batch_tokens = config.max_batch_tokens or self.lengths.max_batch_tokens
        self.description = _within(self.base.description, self.lengths.document_tokens)
        self._handlers: Mapping[type, Callable[[Any], object]] = {
            Plan: self._plan,
            StepRows: self._step,
            CreateRow: self._create,
            DropRow: self._drop,
            ClearGradient: self._clear,
            ExportRow: self._export,
            WriteRow: self._write,
            LoadRow: self._load,
            SnapshotRow: self._snapshot,
            RestoreRow: self._restore,
        }

    def run(self, job: object) -> object:
        """Does a job and returns its answer; see trainer_service.jobs."""
        return self._handlers[type(job)](job)

    def row_counts(self) -> RowCounts:
        return self._rows.counts()

    def _plan(self, plan: Plan) -> tuple[TileResult, ...]:
        wants = [
            Want(tile.training_run_id, frozenset({Part.GRADIENT} if tile.backward else ()))
            for tile in plan.tiles
        ]
        results: list[TileResult] = []
        for span in self._rows.page_in(wants):
            results += self._span(plan.tiles[span.start : span.stop], span)
        return tuple(results)

    def _span(self, tiles: Sequence[Tile], span: Span) -> list[TileResult]:
        """A pass over those tiles whose rows are on the device."""
        present = [tile for tile in tiles if tile.training_run_id not in span.refused]
        passed = iter(self._pass(present) if present else ())
        refused = {run: TileResult(error=error) for run, error in span.refused.items()}
        return [refused.get(tile.training_run_id) or next(passed) for tile in tiles]

    def _pass(self, tiles: Sequence[Tile]) -> tuple[TileResult, ...]:
        rows = {}
        for tile in tiles:
            trained = self._rows[tile.training_run_id]
            trained.gradient_pending |= tile.backward
            rows[tile.training_run_id] = trained.row
        packed = pack(tiles, rows, self.base.device)
        self.base.recomputation.on = len(packed.tokens) > self.lengths.kept_tokens
        with _deterministic(any(tile.isolated for tile in tiles)):
            return run_pass(self.base, packed)

    def _step(self, job: StepRows) -> tuple[StepResult, ...]:
        wants = [Want(step.training_run_id, frozenset(TRAINING_PARTS)) for step in job.steps]
        results: list[StepResult] = []
        for span in self._rows.page_in(wants):
            results += self._step_span(job.steps[span.start : span.stop], span)
        return tuple(results)

    def _step_span(self, jobs: Sequence[StepRow], span: Span) -> list[StepResult]:
        """Steps of those whose rows are on the device."""
        assert len({job.training_run_id for job in jobs}) == len(jobs), "two steps of one run"
        rows = [self._rows[job.training_run_id] for job in jobs]
        stepped = iter(
            step_rows(
                [
                    RowStep(trained.row, trained.step, job.adam_params)
                    for trained, job in zip(rows, jobs, strict=True)
                    if job.training_run_id not in span.refused
                ]
            )
        )
        results = []
        for trained, job in zip(rows, jobs, strict=True):
            error = span.refused.get(job.training_run_id)
            if error is None:
                result = next(stepped)
                if result.error is None:
                    trained.weight_digest = digest(trained.row.part(Part.WEIGHTS))
                    result = replace(result, weight_digest=trained.weight_digest)
                trained.gradient_pending = False
            else:
                result = StepResult(step=trained.step, grad_norm=0.0, error=error)
                trained.clear_gradient()
            trained.step = result.step
            results.append(result)
        return results

    def _create(self, job: CreateRow) -> RowDescription:
        spec = self._resolve(job.request)
        trained = self._rows.add(job.training_run_id, self._bank.add(spec))
        try:
            start = job.start or RowArrays(weights=initial_arrays(spec, self.base.shapes))
            self._fill(job.training_run_id, start)
        except MintError:
            self._rows.remove(job.training_run_id)
            raise
        return RowDescription(
            spec=spec,
            trainable_parameter_count=trained.row.parameter_count(),
            row_bytes=trained.row.bank.part_bytes,
        )

    def _resolve(self, request: LoraRequest | AdapterSpec) -> AdapterSpec:
        if isinstance(request, AdapterSpec):
            return request
        return resolve(request, self.base.description.linear_modules)

    def _drop(self, job: DropRow) -> None:
        self._rows.remove(job.training_run_id)

    def _clear(self, job: ClearGradient) -> None:
        self._rows[job.training_run_id].clear_gradient()

    def _export(self, job: ExportRow) -> RowArrays:
        trained = self._rows.here(job.training_run_id)
        weights = trained.row.export(Part.WEIGHTS)
        if not job.with_optimizer:
            return RowArrays(weights=weights, step=trained.step)
        return RowArrays(
            weights=weights,
            exp_avg=trained.row.export(Part.EXP_AVG),
            exp_avg_sq=trained.row.export(Part.EXP_AVG_SQ),
            step=trained.step,
        )

    def _write(self, job: WriteRow) -> None:
        write_weights(job, self._rows.here(job.manifest.training_run_id), self._progress)

    def _load(self, job: LoadRow) -> None:
        # First: the front counts on it whatever becomes of the load.
        self._rows[job.training_run_id].clear_gradient()
        self._fill(job.training_run_id, job.start)

    def _snapshot(self, job: SnapshotRow) -> RowCopy:
        return copy_row(job, self._rows.here(job.training_run_id), self.base)

    def _restore(self, job: RestoreRow) -> RestoredRow:
        name = job.training_run_id
        try:
            file = RowFile.open(Path(job.path))
            trained = self._rows.add(name, self._bank.add(job.spec))
            self._rows.here(name, *map(Part, file.digests))
            read_row(file, trained.row)
        except RowDamaged as error:
            self._rows.remove(name)
            raise StateDamaged(name, error.message) from error
        except MintError:
            self._rows.remove(name)
            raise
        trained.step = int(file.about["step"])
        trained.gradient_pending = file.about["gradient_pending"] == "1"
        return RestoredRow(difference(file, self.base))

    def _fill(self, training_run_id: str, start: RowArrays) -> None:
        if (start.exp_avg is None) != (start.exp_avg_sq is None):
            raise InvalidRequest("a checkpoint holds one Adam moment but not the other")
        trained = self._rows.here(training_run_id, *(MOMENTS if start.exp_avg else ()))
        row = trained.row
        trained.weight_digest = 0
        row.load(Part.WEIGHTS, start.weights)
        if start.exp_avg is None or start.exp_avg_sq is None:
            for part in MOMENTS:
                row.free(part)
            trained.step = 0
        else:
            row.load(Part.EXP_AVG, start.exp_avg)
            row.load(Part.EXP_AVG_SQ, start.exp_avg_sq)
            trained.step = start.step


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Lets torch run deterministic algorithms alone; an operation that has none raises."""
    # It would fill memory that is written anyway, to make reads of what was never written repeat.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _within(model: ModelDescription, document_tokens: int) -> ModelDescription:
    """The model with the context that memory holds."""
    if document_tokens >= model.context_length:
        return model
    logger.warning(
        "memory holds %d tokens of one sequence, the model's context is %d",
        document_tokens,
        model.context_length,
    )
    return replace(model, context_length=document_tokens, memory_bound=True)

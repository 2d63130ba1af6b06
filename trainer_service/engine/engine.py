"""The engine: rows of adapters on one base model, and the jobs done on them."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from checkpoint_store.row_file import RowDamaged, RowFile
from mint_core.engine_host.carried import here
from mint_core.engine_host.pipe import ModelDescription
from mint_core.errors import MintError
from mint_core.lora.bank import AdapterRow, Part
from mint_core.lora.spec import AdapterArrays, AdapterSpec, LoraRequest
from mint_core.lora.targets import initial_arrays, resolve
from mint_core.model.loading import LoadedBase, load_base
from mint_core.model.recordings import GraphRecorder
from trainer_service import jobs
from trainer_service.config import TrainerConfig
from trainer_service.engine import saving
from trainer_service.engine.memory import budget_bytes, lengths, measure, most_bytes
from trainer_service.engine.optimizer import largest, step_rows
from trainer_service.engine.packing import pack
from trainer_service.engine.recorded.passes import RecordedPasses
from trainer_service.engine.recorded.shapes import GRAPHS_SHARE, most_recorded_tokens
from trainer_service.engine.row_files import RowFiles
from trainer_service.engine.rows import Rows, device_limit_bytes, host_limit_bytes
from trainer_service.engine.trained_row import Want
from trainer_service.engine.training_pass import run_pass
from trainer_service.errors import StateDamaged

logger = logging.getLogger(__name__)

PASS = (Part.WEIGHTS, Part.GRADIENT)
MOMENTS = (Part.EXP_AVG, Part.EXP_AVG_SQ)

W = TypeVar("W", jobs.Tile, jobs.StepRow)
R = TypeVar("R", jobs.TileResult, jobs.StepResult)


class Engine:
    """Holds the rows of all runs. One thread; `run` does one job at a time."""

    def __init__(
        self,
        config: TrainerConfig,
        progress: Callable[[], None] = lambda: None,  # called now and then during long jobs
    ) -> None:
        # cuBLAS is deterministic only with a workspace of its own per stream, set before it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.base: LoadedBase = load_base(config, progress=progress)
        self._bank = self.base.new_bank()
        self._saved_rows = here(config.saved_row_folder)
        self._progress = progress
        device = self.base.device
        rows = (
            config.row_memory_bytes
            or device_limit_bytes(device, config.own_share) // config.divided
        )
        host_rows = config.host_row_memory_bytes or host_limit_bytes(device) // config.sharing
        self._rows = Rows(
            rows,
            host_limit_bytes=host_rows,
            files=RowFiles(here(config.idle_row_folder), progress),
            progress=progress,
            device=device,
        )
        memory = measure(self.base, config.max_lora_rank)
        budget = budget_bytes(device, config.own_share) // config.divided
        # Graphs keep what they take, so that other passes do without it.
        recorded = int(GRAPHS_SHARE * budget) if device.type == "cuda" else 0
        self.recorded = (
            RecordedPasses(self.base, most_recorded_tokens(memory, recorded), GraphRecorder(device))
            if recorded
            else None
        )
        self.lengths = lengths(memory, budget - recorded, device.type)
        self.max_batch_tokens = config.max_batch_tokens or self.lengths.max_batch_tokens
        self.description = _within(self.base.description, self.lengths.document_tokens)
        most_tokens = max(self.max_batch_tokens, self.description.context_length)
        self.memory_limits = {
            "base": self.description.memory_bytes,
            "rows": rows,
            "host_rows": host_rows,
            "passes": most_bytes(memory, self.lengths, most_tokens) + recorded,
        }
        self._handlers: Mapping[type, Callable[[Any], object]] = {
            jobs.Plan: self._plan,
            jobs.StepRows: self._step,
            jobs.CreateRow: self._create,
            jobs.DropRow: self._drop,
            jobs.ClearGradient: self._clear,
            jobs.WriteRow: self._write,
            jobs.SaveCheckpoint: self._save,
            jobs.StoreRow: saving.store_row_later,
            jobs.LoadRow: self._load,
            jobs.SaveRow: self._save_row,
            jobs.RestoreRow: self._restore,
        }

    def run(self, job: object) -> object:
        """Does a job and returns its answer, or the `Rest` of it; see trainer_service.jobs."""
        return self._handlers[type(job)](job)

    def row_counts(self) -> jobs.RowCounts:
        return self._rows.counts()

    def counts(self) -> jobs.EngineCounts:
        """What the front reports of the engine."""
        return jobs.EngineCounts(
            rows=self.row_counts(),
            passes=dict(self.recorded.counts) if self.recorded else {},
            fetches=dict(self._rows.ahead.counts),
        )

    def _plan(self, plan: jobs.Plan) -> tuple[jobs.TileResult, ...]:
        wants = [
            (tile.training_run_id, frozenset(PASS if tile.backward else PASS[:1]))
            for tile in plan.tiles
        ]
        return self._by_spans(
            plan.tiles,
            wants,
            [*self._steps_after(plan), *_passes_of(plan.coming)],
            self._pass,
            lambda tile, error: jobs.TileResult(error=error),
        )

    def _steps_after(self, plan: jobs.Plan) -> Iterator[Want]:
        """What the steps of runs will want that have gone back for the last time before them, as
        it seems.
        """
        for tile in plan.tiles:
            trained = self._rows[tile.training_run_id]
            trained.backwards += tile.backward
            if trained.step_is_next and tile.training_run_id not in plan.coming:
                yield tile.training_run_id, frozenset(Part)

    def _by_spans(
        self,
        work: Sequence[W],
        wants: Sequence[Want],  # of each
        coming: Sequence[Want],  # of what is probably done next
        do: Callable[[Sequence[W]], Sequence[R]],
        refuse: Callable[[W, MintError], R],
    ) -> tuple[R, ...]:
        """Does at a time what has its rows on the device, and refuses what cannot have them."""
        results: list[R] = []
        for span, refused in self._rows.page_in(wants, coming):
            present = [each for each in work[span] if each.training_run_id not in refused]
            done = iter(do(present) if present else ())
            for each in work[span]:
                error = refused.get(each.training_run_id)
                results.append(refuse(each, error) if error else next(done))
        return tuple(results)

    def _pass(self, tiles: Sequence[jobs.Tile]) -> tuple[jobs.TileResult, ...]:
        rows = {}
        for tile in tiles:
            trained = self._rows.at_hand(tile.training_run_id)
            trained.gradient_pending |= tile.backward
            rows[tile.training_run_id] = trained.row
        try:
            return self._compute(tiles, rows)
        finally:
            self.base.context.forget()

    def _compute(
        self, tiles: Sequence[jobs.Tile], rows: Mapping[str, AdapterRow]
    ) -> tuple[jobs.TileResult, ...]:
        if self.recorded and (results := self.recorded.run(tiles, rows)) is not None:
            return results
        packed = pack(tiles, rows, self.base.device, self.base.rows_computed)
        more = sum(jobs.tile_cost(tile) - jobs.tile_tokens(tile) for tile in tiles)
        self.base.recomputation.on = len(packed.tokens) + more > self.lengths.kept_tokens
        with _deterministic(any(tile.isolated for tile in tiles)):
            return run_pass(self.base, packed)

    def _step(self, job: jobs.StepRows) -> tuple[jobs.StepResult, ...]:
        wants = [(step.training_run_id, frozenset(Part)) for step in job.steps]
        coming = _passes_of(job.coming)
        return self._by_spans(job.steps, wants, coming, self._take_steps, self._refuse_step)

    def _take_steps(self, steps: Sequence[jobs.StepRow]) -> list[jobs.StepResult]:
        assert len({step.training_run_id for step in steps}) == len(steps), "two steps of one run"
        rows = [self._rows.at_hand(step.training_run_id) for step in steps]
        for trained in rows:
            trained.note_step()
        return step_rows(list(zip(rows, steps, strict=True)))

    def _refuse_step(self, step: jobs.StepRow, error: MintError) -> jobs.StepResult:
        trained = self._rows[step.training_run_id]
        trained.clear_gradient()
        return jobs.StepResult(step=trained.step, grad_norm=0.0, error=error)

    def _create(self, job: jobs.CreateRow) -> jobs.RowDescription:
        spec, parts, step = self._start(job.request)
        with self._rows.adding(job.training_run_id, self._bank.add(spec)) as trained:
            self._fill(job.training_run_id, parts, step)
        return jobs.RowDescription(
            spec=spec,
            trainable_parameter_count=trained.row.parameter_count(),
            row_bytes=trained.row.bank.part_bytes,
        )

    def _start(
        self, request: LoraRequest | AdapterSpec | jobs.Source
    ) -> tuple[AdapterSpec, Mapping[Part, AdapterArrays], int]:
        """What a row is, with what it begins, and at which step."""
        if isinstance(request, jobs.Source):
            return request.spec, saving.read_source(request), request.step
        if isinstance(request, LoraRequest):
            request = resolve(request, self.base.description.linear_modules)
        return request, {Part.WEIGHTS: initial_arrays(request, self.base.shapes)}, 0

    def _drop(self, job: jobs.DropRow) -> None:
        self._rows.remove(job.training_run_id)

    def _clear(self, job: jobs.ClearGradient) -> None:
        self._rows[job.training_run_id].clear_gradient()

    def _write(self, job: jobs.WriteRow) -> None:
        trained = self._rows.here(job.manifest.training_run_id, Part.WEIGHTS)
        saving.write_weights(job, trained, self._progress)

    def _save(self, job: jobs.SaveCheckpoint) -> saving.Rest:
        run = job.manifest.training_run_id
        parts = self._rows[run].worth_keeping if job.with_optimizer else (Part.WEIGHTS,)
        return saving.save_checkpoint_later(job, self._rows.here(run, *parts))

    def _load(self, job: jobs.LoadRow) -> None:
        # First: the front counts on it whatever becomes of the load.
        self._rows[job.training_run_id].clear_gradient()
        self._fill(job.training_run_id, saving.read_source(job.source), job.source.step)

    def _save_row(self, job: jobs.SaveRow) -> saving.Rest:
        trained, parts = self._rows[job.training_run_id], self._rows.kept(job.training_run_id)
        return saving.save_row_later(job, trained, parts, self.base, self._saved_rows)

    def _restore(self, job: jobs.RestoreRow) -> str:
        name = job.training_run_id
        try:
            file = RowFile.open(self._saved_rows / job.file)
            with self._rows.adding(name, self._bank.add(job.spec)) as trained:
                self._rows.here(name, *map(Part, file.digests))
                saving.read_saved_row(file, trained.row)
        except RowDamaged as error:
            raise StateDamaged(name, error.message) from error
        trained.step = int(file.about["step"])
        trained.gradient_pending = file.about["gradient_pending"] == "1"
        return saving.difference(file, self.base)

    def _fill(self, name: str, parts: Mapping[Part, AdapterArrays], step: int) -> None:
        """Replaces weights, moments and step; without moments they become 0."""
        trained = self._rows.here(name, *parts)
        trained.weight_digest = 0
        for part, arrays in parts.items():
            trained.row.load(part, arrays)
        for part in MOMENTS:
            if part not in parts:
                self._rows.free(name, part)
        trained.largest = largest(trained.row, moments=Part.EXP_AVG in parts)
        trained.step = step


def _passes_of(runs: Sequence[str]) -> list[Want]:
    """What their passes will want."""
    return [(run, frozenset(PASS)) for run in runs]


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

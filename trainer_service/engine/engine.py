"""The engine: rows of adapters on one base model, and the jobs done on them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from mint_core.errors import EngineFault, InvalidRequest, MintError
from mint_core.lora.bank import TRAINING_PARTS, Part
from mint_core.lora.spec import AdapterSpec, LoraRequest
from mint_core.lora.targets import initial_arrays, resolve
from mint_core.model.loading import LoadedBase, load_base
from trainer_service.engine.optimizer import step_row
from trainer_service.engine.packing import pack
from trainer_service.engine.row_files import RowFiles
from trainer_service.engine.rows import (
    Rows,
    Span,
    Want,
    device_limit_bytes,
    host_limit_bytes,
)
from trainer_service.engine.training_pass import run_pass
from trainer_service.jobs import (
    ClearGradient,
    CreateRow,
    DropRow,
    EngineConfig,
    ExportRow,
    LoadRow,
    Plan,
    RowArrays,
    RowCounts,
    RowDescription,
    StepResult,
    StepRow,
    StepRows,
    Tile,
    TileResult,
)

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.25  # of what is free after loading, for the activations of one pass
LEAST_BATCH_TOKENS = 256
# A pass is what a small request of another run waits for at most, and a CPU's matrix products are
# at full speed long before an accelerator's.
MOST_BATCH_TOKENS_CPU = 1024
MOST_BATCH_TOKENS = 16_384
MOMENTS = (Part.EXP_AVG, Part.EXP_AVG_SQ)


class Engine:
    """Holds the rows of all runs. One thread; `run` does one job at a time."""

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[], None] = lambda: None,  # called now and then during long jobs
    ) -> None:
        self.base: LoadedBase = load_base(
            config.base_model,
            name=config.base_model_name,
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            max_lora_rank=config.max_lora_rank,
        )
        self._bank = self.base.new_bank(TRAINING_PARTS)
        device = self.base.device
        self._rows = Rows(
            config.row_memory_bytes or device_limit_bytes(device),
            host_limit_bytes=config.host_row_memory_bytes or host_limit_bytes(device),
            files=RowFiles(Path(config.row_folder)),
            progress=progress,
        )
        self.max_batch_tokens = config.max_batch_tokens or affordable_tokens(self.base)
        self._handlers: Mapping[type, Callable[[Any], object]] = {
            Plan: self._plan,
            StepRows: self._step,
            CreateRow: self._create,
            DropRow: self._drop,
            ClearGradient: self._clear,
            ExportRow: self._export,
            LoadRow: self._load,
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
        try:
            return run_pass(self.base, packed)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            logger.exception("a pass of %d tokens failed", len(packed.tokens))
            fault = EngineFault(
                f"the engine ran out of memory on a batch of {len(packed.tokens)} tokens; "
                "send shorter sequences, or start the trainer with a smaller --max-batch-tokens"
            )
            return tuple(TileResult(error=fault) for _ in tiles)

    def _step(self, job: StepRows) -> tuple[StepResult, ...]:
        wants = [Want(step.training_run_id, frozenset(TRAINING_PARTS)) for step in job.steps]
        results = []
        for span in self._rows.page_in(wants):
            for step in job.steps[span.start : span.stop]:
                results.append(self._step_one(step, span.refused.get(step.training_run_id)))
        return tuple(results)

    def _step_one(self, job: StepRow, refusal: MintError | None) -> StepResult:
        trained = self._rows[job.training_run_id]
        if refusal is not None:
            trained.clear_gradient()
            return StepResult(step=trained.step, grad_norm=0.0, error=refusal)
        result = step_row(trained.row, trained.step, job.adam_params)
        trained.step = result.step
        trained.gradient_pending = False
        return result

    def _create(self, job: CreateRow) -> RowDescription:
        spec = self._resolve(job.request)
        trained = self._rows.add(job.training_run_id, self._bank.add(spec))
        try:
            start = job.start or RowArrays(weights=initial_arrays(spec, self.base.shapes))
            self._fill(job.training_run_id, start)
        except MintError:
            self._rows.remove(job.training_run_id)
            raise
        return RowDescription(spec=spec, trainable_parameter_count=trained.row.parameter_count())

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

    def _load(self, job: LoadRow) -> None:
        # First: the front counts on it whatever becomes of the load.
        self._rows[job.training_run_id].clear_gradient()
        self._fill(job.training_run_id, job.start)

    def _fill(self, training_run_id: str, start: RowArrays) -> None:
        if (start.exp_avg is None) != (start.exp_avg_sq is None):
            raise InvalidRequest("a checkpoint holds one Adam moment but not the other")
        trained = self._rows.here(training_run_id, *(MOMENTS if start.exp_avg else ()))
        row = trained.row
        row.load(Part.WEIGHTS, start.weights)
        if start.exp_avg is None or start.exp_avg_sq is None:
            for part in MOMENTS:
                row.free(part)
            trained.step = 0
        else:
            row.load(Part.EXP_AVG, start.exp_avg)
            row.load(Part.EXP_AVG_SQ, start.exp_avg_sq)
            trained.step = start.step


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed. The CPU's allocator has no exception class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def affordable_tokens(base: LoadedBase) -> int:
    """How many tokens one pass may hold: a share of free memory over what a token's activations
    take.

    Per layer a pass keeps about six hidden-size vectors and the inputs and outputs of each linear
    layer. Rounded down to a power of two: requests are cut by it, and should be cut alike after a
    restart that finds a little more or less memory free.
    """
    hidden_size: int = base.model.config.hidden_size  # type: ignore[union-attr,assignment]
    layers: int = base.model.config.num_hidden_layers  # type: ignore[union-attr,assignment]
    linear = sum(s.in_features + s.out_features for n, s in base.shapes.items() if n != "lm_head")
    per_token_bytes = (layers * 6 * hidden_size + linear) * base.dtype.itemsize
    free = (
        torch.cuda.mem_get_info(base.device)[0]
        if base.device.type == "cuda"
        else psutil.virtual_memory().available
    )
    affordable = max(LEAST_BATCH_TOKENS, int(MEMORY_SHARE * free / per_token_bytes))
    most = MOST_BATCH_TOKENS_CPU if base.device.type == "cpu" else MOST_BATCH_TOKENS
    return min(most, 1 << (affordable.bit_length() - 1))

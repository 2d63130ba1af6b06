"""The trainer's engine in the test's own process, and data for it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mint_core.lora.spec import AdapterArrays, AdapterSpec, LoraRequest
from tests.models import VOCABULARY_SIZE
from trainer_service.engine.engine import Engine
from trainer_service.jobs import (
    AdamParams,
    CreateRow,
    CrossEntropy,
    Document,
    DropRow,
    EngineConfig,
    ExportRow,
    Gspo,
    LoadRow,
    Loss,
    Plan,
    RowArrays,
    RowDescription,
    StepResult,
    StepRow,
    StepRows,
    Tile,
    TileResult,
)

NO_ADAPTER = LoraRequest(rank=8)  # B is zero until it is trained


def make_engine(
    folder: Path, progress: Callable[[], None] = lambda: None, **changes: object
) -> Engine:
    settings = {
        "base_model": str(folder),
        "base_model_name": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "max_lora_rank": 128,
        "max_batch_tokens": 0,
        "row_memory_bytes": 0,
        "host_row_memory_bytes": 0,
        "row_folder": str(folder / "rows"),
    }
    return Engine(EngineConfig(**{**settings, **changes}), progress)  # type: ignore[arg-type]


def make_documents(
    seed: int, lengths: Sequence[int], *, prompt_share: float = 0.3
) -> tuple[Document, ...]:
    """Random documents that fit every loss; the first share of each has weight 0."""
    rng = np.random.default_rng(seed)
    documents = []
    for n in lengths:
        weights = rng.uniform(0.5, 1.5, n).astype(np.float32)
        weights[: int(n * prompt_share)] = 0.0
        documents.append(
            Document(
                tokens=rng.integers(0, VOCABULARY_SIZE, n),
                targets=rng.integers(0, VOCABULARY_SIZE, n),
                weights=weights,
                # Near what a tiny random model gives: ratios fall on both sides of the clips.
                logprobs=rng.normal(-6.5, 1.0, n).astype(np.float32),
                advantages=rng.normal(0.0, 1.0, n).astype(np.float32),
            )
        )
    return tuple(documents)


def wide_documents(seed: int, lengths: Sequence[int], k: int) -> tuple[Document, ...]:
    """As `make_documents`, with k targets and weights at each position, some of them 0."""
    rng = np.random.default_rng(seed)
    documents = []
    for document in make_documents(seed, lengths):
        targets = rng.integers(0, VOCABULARY_SIZE, (len(document.tokens), k))
        weights = document.weights[:, None] * rng.dirichlet(np.ones(k), len(document.tokens))
        weights[rng.random(weights.shape) < 0.2] = 0.0
        wide = replace(document, targets=targets, weights=weights.astype(np.float32))
        documents.append(replace(wide, logprobs=None, advantages=None))
    return tuple(documents)


def for_loss(documents: Sequence[Document], loss: Loss) -> tuple[Document, ...]:
    """The documents with what only that loss reads."""
    if not isinstance(loss, Gspo):
        return tuple(documents)
    return tuple(replace(d, ratio_mask=d.weighted.astype(np.float32)) for d in documents)


def random_arrays(spec_arrays: AdapterArrays, seed: int) -> AdapterArrays:
    """Random A and B, neither of them zero, in the shapes of an adapter."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0.0, 0.05, array.shape).astype(np.float32)
        for name, array in sorted(spec_arrays.items())
    }


class EngineRun:
    """A run on an engine, in a test's words."""

    def __init__(
        self, engine: Engine, name: str, request: LoraRequest, *, random: int | None = None
    ) -> None:
        self.engine, self.name, self._sequence = engine, name, 0
        description = engine.run(CreateRow(training_run_id=name, request=request))
        assert isinstance(description, RowDescription)
        self.spec: AdapterSpec = description.spec
        if random is not None:
            start = RowArrays(weights=random_arrays(self.export(False).weights, random))
            engine.run(LoadRow(training_run_id=name, start=start))

    def tile(
        self,
        documents: Sequence[Document],
        loss: Loss,
        *,
        backward: bool = True,
        weighted: bool = False,
        isolated: bool = False,
    ) -> Tile:
        self._sequence += 1
        return Tile(
            training_run_id=self.name,
            sequence=self._sequence,
            index=0,
            documents=tuple(documents),
            loss=loss,
            backward=backward,
            weighted_only=weighted,
            isolated=isolated,
        )

    def compute(self, tile: Tile) -> TileResult:
        return run_plan(self.engine, tile)[0]

    def step(self, params: AdamParams) -> StepResult:
        results = self.engine.run(StepRows((StepRow(self.name, params),)))
        assert isinstance(results, tuple)
        result = results[0]
        assert isinstance(result, StepResult)
        return result

    def export(self, with_optimizer: bool = True) -> RowArrays:
        arrays = self.engine.run(ExportRow(self.name, with_optimizer))
        assert isinstance(arrays, RowArrays)
        return arrays


def score(
    engine: Engine,
    tokens: Sequence[int],
    spec: AdapterSpec | LoraRequest = NO_ADAPTER,
    weights: AdapterArrays | None = None,  # of the adapter
) -> NDArray[np.float32]:
    """Logprobs of all tokens but the first, in a new run of the trainer."""
    start = None if weights is None else RowArrays(weights=weights)
    engine.run(CreateRow(training_run_id="scored", request=spec, start=start))
    stream = np.array(tokens)
    document = Document(
        tokens=stream[:-1], targets=stream[1:], weights=np.ones(len(stream) - 1, np.float32)
    )
    tile = Tile(
        training_run_id="scored",
        sequence=1,
        index=0,
        documents=(document,),
        loss=CrossEntropy(),
        backward=False,
        weighted_only=False,
    )
    (logprobs,) = run_plan(engine, tile)[0].logprobs
    engine.run(DropRow("scored"))
    return logprobs


def run_plan(engine: Engine, *tiles: Tile) -> tuple[TileResult, ...]:
    results = engine.run(Plan(tiles))
    assert isinstance(results, tuple)
    return results

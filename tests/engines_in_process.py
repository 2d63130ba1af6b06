"""The trainer's engine in the test's own process, and data for it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from checkpoint_store import Manifest, new_manifest
from checkpoint_store.adapter_files import read_moments, read_weights, write_files
from checkpoint_store.row_file import RowFile
from mint_core.lora.bank import Part
from mint_core.lora.row_layout import RowLayout
from mint_core.lora.spec import AdapterArrays, AdapterSpec, LoraRequest
from tests.checkpoint_files import source_of
from tests.models import VOCABULARY_SIZE
from trainer_service.config import TrainerConfig
from trainer_service.engine.engine import Engine
from trainer_service.jobs import (
    AdamParams,
    CreateRow,
    CrossEntropy,
    Document,
    DropRow,
    Gspo,
    LoadRow,
    Loss,
    Plan,
    RowDescription,
    SaveCheckpoint,
    SavedRow,
    SaveRow,
    Source,
    StepResult,
    StepRow,
    StepRows,
    Tile,
    TileResult,
)

_SAVED_ROWS = TemporaryDirectory(prefix="mint-saved-rows-")
NO_ADAPTER = LoraRequest(rank=8)  # B is zero until it is trained


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Allows memories that are smaller than a server's, and rows saved anywhere."""

    row_memory_bytes: int = 0
    host_row_memory_bytes: int = 0
    saved_row_folder: Path = Path(_SAVED_ROWS.name)


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
        "row_folder": folder / "rows",
    }
    return Engine(Config(**{**settings, **changes}), progress)  # type: ignore[arg-type]


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


@dataclass(frozen=True, kw_only=True)
class RowArrays:
    """A row's content outside the engine, by PEFT's names."""

    weights: AdapterArrays
    exp_avg: AdapterArrays | None = None
    exp_avg_sq: AdapterArrays | None = None
    step: int = 0


def manifest_of(name: str, spec: AdapterSpec, step: int = 0) -> Manifest:
    manifest = new_manifest(
        "a",
        Manifest(
            training_run_id="r",
            kind="weights",
            tenant="t",
            base_model="tiny",
            base_fingerprint="f00d",
            spec=spec,
            step=step,
        ),
    )
    return replace(manifest, training_run_id=name)  # an engine takes any name


@contextlib.contextmanager
def as_source(spec: AdapterSpec, arrays: RowArrays) -> Iterator[Source]:
    """A checkpoint with that content, for a while."""
    manifest = manifest_of("r", spec, arrays.step)
    moments = None
    if arrays.exp_avg is not None and arrays.exp_avg_sq is not None:
        moments = arrays.exp_avg, arrays.exp_avg_sq
    with TemporaryDirectory() as folder:
        write_files(
            Path(folder),
            arrays.weights,
            moments,
            spec=spec,
            base_model=manifest.base_model,
            base_fingerprint=manifest.base_fingerprint,
            step=arrays.step,
        )
        yield source_of(manifest, Path(folder), with_optimizer=moments is not None)


def save(engine: Engine, job: SaveCheckpoint | SaveRow) -> object:
    """Has a row saved, background and all."""
    rest = engine.run(job)
    assert callable(rest)
    answer: object = rest(lambda: None)
    return answer


class EngineRun:
    """A run on an engine, in a test's words."""

    def __init__(
        self, engine: Engine, name: str, request: LoraRequest, *, random: int | None = None
    ) -> None:
        self.engine, self.name, self._sequence, self._taken = engine, name, 0, 0
        description = engine.run(CreateRow(name, request))
        assert isinstance(description, RowDescription)
        self.spec: AdapterSpec = description.spec
        if random is not None:
            self.load(RowArrays(weights=random_arrays(self.export(False).weights, random)))

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

    def step(self, params: AdamParams, *, replayed: bool = False) -> StepResult:
        results = self.engine.run(StepRows((StepRow(self.name, params, replayed=replayed),)))
        assert isinstance(results, tuple)
        result = results[0]
        assert isinstance(result, StepResult)
        self._taken = result.step
        return result

    def load(self, arrays: RowArrays) -> None:
        with as_source(self.spec, arrays) as source:
            self.engine.run(LoadRow(self.name, source))
        self._taken = arrays.step

    def saved(self) -> RowFile:
        saved = save(self.engine, SaveRow(training_run_id=self.name, sequence=0, optional=False))
        assert isinstance(saved, SavedRow)
        return RowFile.open(Path(_SAVED_ROWS.name, saved.file))

    def gradient(self) -> AdapterArrays:
        row = self.saved()
        layout = RowLayout(row.about["layout"].encode())
        return layout.matrices(row.read(Part.GRADIENT.value), self.spec)

    def export(self, with_optimizer: bool = True) -> RowArrays:
        manifest = manifest_of(self.name, self.spec)
        with TemporaryDirectory() as folder:
            job = SaveCheckpoint(manifest=manifest, folder=folder, with_optimizer=with_optimizer)
            save(self.engine, job)
            weights = read_weights(Path(folder))
            first, second = read_moments(Path(folder)) if with_optimizer else (None, None)
        return RowArrays(weights=weights, exp_avg=first, exp_avg_sq=second, step=self._taken)


def score(
    engine: Engine,
    tokens: Sequence[int],
    spec: AdapterSpec | LoraRequest = NO_ADAPTER,
    weights: AdapterArrays | None = None,  # of the adapter
) -> NDArray[np.float32]:
    """Logprobs of all tokens but the first, in a new run of the trainer."""
    with contextlib.ExitStack() as stack:
        if weights is not None:
            assert isinstance(spec, AdapterSpec)
            source = stack.enter_context(as_source(spec, RowArrays(weights=weights)))
            engine.run(CreateRow("scored", source))
        else:
            engine.run(CreateRow("scored", spec))
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

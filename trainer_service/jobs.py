"""What the trainer's front and engine say to each other: frozen dataclasses of numpy arrays.

The engine keeps rows (adapter weights, gradient, moments, step) by `training_run_id` and does what
it is told; order, retries, fairness and the rules about incomplete gradients are the front's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from checkpoint_store import Manifest
from mint_core.errors import MintError
from mint_core.lora.spec import AdapterSpec, LoraRequest

Floats = NDArray[np.float32]

# How many targets of a token, beyond its first, cost as much as a token. On a tiny model (2 layers
# of 64; a busy core, 2026-11-29) a token takes 50 us and a target 0.05; a target is 24 bytes on the
# device, a token at least 20 KB. Larger models' tokens take and hold more.
TARGETS_PER_TOKEN = 256


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """-sum(weights * logprobs)."""


@dataclass(frozen=True, slots=True)
class ImportanceSampling:
    """-sum(weights * ratio * advantages)."""


@dataclass(frozen=True, slots=True)
class Ppo:
    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2


@dataclass(frozen=True, slots=True)
class Cispo:
    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2


@dataclass(frozen=True, slots=True)
class Dro:
    beta: float


@dataclass(frozen=True, slots=True)
class Gspo:
    """Ppo on the ratio of whole sequences; the thresholds are the paper's."""

    clip_low_threshold: float = 1 - 3e-4
    clip_high_threshold: float = 1 + 4e-4


Loss = CrossEntropy | ImportanceSampling | Ppo | Cispo | Dro | Gspo


# What each pass brings has no slots, and so is pickled and read in three quarters of the time.
@dataclass(frozen=True, kw_only=True)
class Document:
    """One datum, checked. All arrays are [n] if they do not say otherwise; where k targets stand at
    each position, targets and weights are [n, k].
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]  # [n] or [n, k]
    weights: Floats  # as `targets`; 1 where the caller gave none
    logprobs: Floats | None = None  # as sampled
    advantages: Floats | None = None
    ratio_mask: Floats | None = None  # 1 where a token counts in its sequence's ratio, else 0
    clip_low: Floats | None = None
    clip_high: Floats | None = None
    # [n, L, k], the experts that each token goes to, -1 where the routers choose; None: everywhere
    routed: NDArray[np.int32] | None = None

    @property
    def weighted(self) -> NDArray[np.bool_]:  # [n]
        """Where there is a weight other than 0."""
        wide: NDArray[np.bool_] = self.weights.reshape(len(self.tokens), -1) != 0
        return np.asarray(wide.any(axis=1))

    @property
    def cost(self) -> int:
        """What it takes to compute, in tokens of one target each: the one measure of shares, cuts,
        quotas, forecasts and memory. `targets` of any shape count; the first of each token is in
        its own cost.
        """
        more = self.targets.size - len(self.tokens)
        return len(self.tokens) + -(-more // TARGETS_PER_TOKEN)

    @property
    def width(self) -> tuple[int, ...]:
        """(k,), or () for one target at each position."""
        return self.targets.shape[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    learning_rate: float = 5e-5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # 0: no clipping


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Documents of one sequenced call that are computed together. The cut depends on the call's own
    data alone.
    """

    training_run_id: str
    sequence: int
    index: int  # place of the tile in its call, from 0
    documents: tuple[Document, ...]
    loss: Loss
    backward: bool  # whether the gradient is added to the run's row
    weighted_only: bool  # whether logprobs at weight 0 are left out
    isolated: bool = False  # whether it has a plan of its own, run by deterministic algorithms
    alone: bool = False  # whether it has a plan of its own, since engines have died with its call


def saved_row_name(training_run_id: str, sequence: int) -> str:
    """The file of a saved row."""
    return f"{training_run_id}-{sequence}.safetensors"


def tile_tokens(tile: Tile) -> int:
    return sum(len(document.tokens) for document in tile.documents)


def tile_cost(tile: Tile) -> int:
    return sum(document.cost for document in tile.documents)


def most_targets(tile_tokens: int) -> int:
    """How many targets may stand at one position: a token with its targets costs a tile at most,
    so that nobody waits longer for it than for another's tile.
    """
    return 1 + TARGETS_PER_TOKEN * (tile_tokens - 1)


@dataclass(frozen=True)
class Plan:
    """One pass of the engine, tiles of any runs. Answer: `tuple[TileResult, ...]` in the same
    order.
    """

    tiles: tuple[Tile, ...]
    coming: tuple[str, ...] = ()  # runs that will probably have a pass next, in their turns


@dataclass(frozen=True, kw_only=True)
class TileResult:
    """Outcome of a tile. With an error, nothing of the tile is in the gradient."""

    logprobs: tuple[Floats, ...] = ()  # per document, [n] or [positions with weight]
    metrics: Mapping[str, float] = field(default_factory=dict)  # `:sum` all: those of tiles add up
    error: MintError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a row is filled from: the files of a checkpoint, which are verified, or where memory has
    it the row file there. Without moments they and the step become 0.
    """

    revision_path: str
    spec: AdapterSpec
    folder: str
    row_file: str  # in memory; empty: it is not there
    with_optimizer: bool
    step: int  # of the moments


@dataclass(frozen=True, slots=True)
class CreateRow:
    """Makes a row: A drawn from the seed and B zero, as one was made before, or as a checkpoint
    says. Answer: `RowDescription`.
    """

    training_run_id: str
    request: LoraRequest | AdapterSpec | Source


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDescription:
    spec: AdapterSpec
    trainable_parameter_count: int
    row_bytes: int  # of its weights as `WriteRow` writes them


@dataclass(frozen=True, slots=True)
class DropRow:
    """Forgets a row, if it is there. Answer: None."""

    training_run_id: str


@dataclass(frozen=True, slots=True)
class StepRow:
    """One AdamW step on the row's gradient, which is cleared whatever happens."""

    training_run_id: str
    adam_params: AdamParams
    alone: bool = False  # as of a tile
    replayed: bool = False  # it was taken before: so it is again, whatever it leaves


@dataclass(frozen=True, slots=True)
class StepRows:
    """Steps of several runs. Answer: `tuple[StepResult, ...]` in the same order."""

    steps: tuple[StepRow, ...]
    coming: tuple[str, ...] = ()  # as of a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """`error` is a FailedPrecondition when the gradient was not finite, or weights or moments would
    not have been: no step was taken.
    """

    step: int
    grad_norm: float  # before clipping
    weight_digest: int = 0  # 64 bits of the weights after the step
    error: MintError | None = None


@dataclass(frozen=True, slots=True)
class ClearGradient:
    """Answer: None."""

    training_run_id: str


@dataclass(frozen=True, slots=True)
class WriteRow:
    """Writes the weights as the row file of a checkpoint. Raises WeightsNotFinite, and
    RowNotWritten if the file cannot be. Answer: None.
    """

    file: str
    manifest: Manifest  # as it is to stand in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCheckpoint:
    """Writes a row as the files of a checkpoint, in the background: a part, None, says that the row
    may change again. Raises WeightsNotFinite, and ResourceExhausted on a full disk. Answer:
    `Mapping[str, FileEntry]`.
    """

    manifest: Manifest
    folder: str
    with_optimizer: bool


@dataclass(frozen=True, slots=True)
class StoreRow:
    """Writes a row file as the files of its checkpoint, as `SaveCheckpoint` does. No row of the
    engine's takes part.
    """

    file: str
    manifest: Manifest
    folder: str


@dataclass(frozen=True, slots=True)
class LoadRow:
    """Replaces a row's content and clears its gradient. Answer: None.

    Shapes and names must be the row's own (InvalidRequest otherwise), values finite.
    """

    training_run_id: str
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRow:
    """Writes a row to the folder of saved rows, in the background as `SaveCheckpoint`. Raises
    RowNotSaved. Answer: `SavedRow`.
    """

    training_run_id: str
    sequence: int  # of the last call that is in it
    optional: bool  # whether things go on without it, so that an engine that cannot does so too


@dataclass(frozen=True, slots=True)
class SavedRow:
    """A run's row in a file of the state folder, whole."""

    sequence: int  # of the last call that is in it
    file: str  # name
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RestoreRow:
    """Makes a row anew from a saved one. Answer: a text, in which way this engine is another than
    the one that saved it; empty: in none that counts.
    """

    training_run_id: str
    spec: AdapterSpec
    file: str  # name


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """How many rows are where."""

    device: int
    host: int  # on a CPU always 0: its rows are in host memory, which is the device's
    disk: int


@dataclass(frozen=True, kw_only=True)
class EngineCounts:
    """The engine tells it when it has changed."""

    rows: RowCounts
    # Passes, by how they were computed: `recorded`, or why they were not; empty where none is.
    passes: Mapping[str, int]
    # Parts of rows that were not on the device, by how they came: `early`, before they were asked
    # for; `late`, on their way then; `asked`, then; `unused`, in vain.
    fetches: Mapping[str, int] = field(default_factory=dict)

"""What recorded passes have room for, and which plans go into one. What fills a pass up changes no
run's numbers, so shapes are few.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from mint_core.lora.bank import AdapterRow
from mint_core.lora.segments import MIN_ROWS
from trainer_service.engine.memory import ActivationMemory
from trainer_service.jobs import Tile, tile_tokens

TOKENS = (64, 128, 256, 512, *range(1024, 4097, 512))
DOCUMENTS = (8, 64, 512)
TILES = (1, 8, 32, 128)
RANKS = (32, 64, 128, 256, 512, 1024)
GRAPHS_SHARE = 0.25  # of the memory for passes
# What a smaller pass left in pieces is of no use to a larger one: the pieces of all sizes together
# may be as large again, if all come, in rising order.
PIECES = 1.5


class Reason(StrEnum):
    """Why a pass is launched kernel by kernel."""

    TOO_LONG = "too_long"
    TOO_MANY = "too_many"  # documents, tiles of runs, or ranks
    TARGETS = "targets"  # several at a position
    ISOLATED = "isolated"  # by deterministic algorithms, which a recorded pass has not
    EXPERTS = "experts"  # in the model
    MODEL = "model"  # it is of a kind that cannot be recorded; the log says what
    MEMORY = "memory"  # a graph could not be made; the log says why


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a recorded pass."""

    tokens: int
    documents: int  # what fills up included
    tiles: int
    rank: int  # stored, the largest
    backward: bool

    @property
    def row_tiles(self) -> int:
        """Tiles of rows, of those that `Tables` has: each of a plan may end within one."""
        return self.tokens // 32 + self.tiles


def shape_of(
    tiles: Sequence[Tile], rows: Mapping[str, AdapterRow], most_tokens: int
) -> Shape | Reason:
    """The smallest that has room for a plan."""
    if any(tile.isolated for tile in tiles):
        return Reason.ISOLATED
    if any(document.width for tile in tiles for document in tile.documents):
        return Reason.TARGETS
    tokens = sum(max(MIN_ROWS, tile_tokens(tile)) for tile in tiles)
    if tokens > most_tokens:
        return Reason.TOO_LONG
    # One more for what fills a tile up to MIN_ROWS, and one for what fills up the pass.
    documents = sum(len(tile.documents) + (tile_tokens(tile) < MIN_ROWS) for tile in tiles) + 1
    rank = max(rows[tile.training_run_id].bank.stored_rank for tile in tiles)
    sizes = (_room(DOCUMENTS, documents), _room(TILES, len(tiles)), _room(RANKS, rank))
    if None in sizes:
        return Reason.TOO_MANY
    backward = any(tile.backward for tile in tiles)
    room = _room(TOKENS, tokens)
    assert room is not None
    return Shape(room, *sizes, backward)  # type: ignore[arg-type]


def most_recorded_tokens(memory: ActivationMemory, budget_bytes: int) -> int:
    """Of the longest pass whose graphs fit, logits of all its rows included; 0: there is none."""
    fits = (
        tokens
        for tokens in TOKENS
        if PIECES * (memory.pass_bytes(tokens) + tokens * memory.logits_bytes) <= budget_bytes
    )
    return max(fits, default=0)


def _room(sizes: Sequence[int], wanted: int) -> int | None:
    """The smallest of rising sizes that is large enough."""
    place = bisect_left(sizes, wanted)
    return sizes[place] if place < len(sizes) else None

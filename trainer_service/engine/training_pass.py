"""One pass over a packed plan: logprobs of all tiles, their losses, and the gradients into the
rows.

Losses are pure functions of each token's logprob. So the head asks for their slopes chunk by chunk,
as soon as it has a chunk's logprobs, and goes back through the rows where a slope is not 0. Where
the loss also reads the ratio of the whole sequence, the head scores that sequence first.
"""

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mint_core.model.attention import PackedAttention
from mint_core.model.head import Piece
from mint_core.model.loading import LoadedBase
from trainer_service.engine.losses import LossInputs, differentiate, sequence_log_ratios
from trainer_service.engine.packing import PackedPlan, PackedTile
from trainer_service.errors import LossNotFinite
from trainer_service.jobs import TileResult


def run_pass(base: LoadedBase, plan: PackedPlan) -> tuple[TileResult, ...]:
    """Computes a plan and adds the gradients of its backward tiles."""
    backward = any(tile.tile.backward for tile in plan.tiles)
    segments = tuple(tile.segment for tile in plan.tiles)
    attention = PackedAttention(plan.bounds)
    with torch.set_grad_enabled(backward):
        hidden = base.hidden(plan.tokens, plan.positions, segments, attention, plan.routed)
    inputs = _with_sequence_ratios(base, hidden.detach(), plan.tiles)
    scored = [
        _Scored(tile, own.at(tile.scored)) for tile, own in zip(plan.tiles, inputs, strict=True)
    ]
    asked = [tile for tile in scored if len(tile.packed.scored)]
    gradient = _score(base, hidden.detach(), asked)
    if gradient is not None and hidden.requires_grad:
        hidden.backward(gradient)
    return tuple(
        tile_result(
            tile.packed,
            _joined(tile.logprobs).cpu().numpy(),
            _joined(tile.losses).double().sum().item(),
        )
        for tile in scored
    )


@dataclass(slots=True, eq=False)
class _Scored:
    """A tile and what the head says about it."""

    packed: PackedTile
    inputs: LossInputs  # each [scored]
    logprobs: list[Tensor] = field(default_factory=list)  # part after part, [n] or [n, k]
    losses: list[Tensor] = field(default_factory=list)

    def slope(self, place: slice, logprobs: Tensor) -> Tensor:  # as `logprobs`
        """d loss / d logprob of the next part of the scored places; keeps its losses."""
        tile = self.packed.tile
        losses, slope = differentiate(tile.loss, logprobs, self.inputs.at(place))
        self.logprobs.append(logprobs)
        self.losses.append(losses)
        return slope if tile.backward else torch.zeros_like(slope)


def _score(base: LoadedBase, hidden: Tensor, tiles: list[_Scored]) -> Tensor | None:
    """Gives each tile its logprobs and losses. Returns d loss / d hidden, [tokens, hidden size], or
    None if nothing asks for it.
    """
    pieces = [
        Piece(tile.packed.segment, tile.packed.scored + tile.packed.segment.start) for tile in tiles
    ]
    targets = [tile.packed.targets[tile.packed.scored] for tile in tiles]
    return base.head.gradient(
        hidden, pieces, targets, lambda i, place, logprobs: tiles[i].slope(place, logprobs)
    )


def _with_sequence_ratios(
    base: LoadedBase, hidden: Tensor, tiles: tuple[PackedTile, ...]
) -> list[LossInputs]:
    """What each tile's loss reads, ratios of whole sequences included."""
    inputs = {tile: tile.inputs for tile in tiles}
    masks = {tile: tile.ratio_mask for tile in tiles if tile.ratio_mask is not None}
    rows = [torch.nonzero(mask)[:, 0] for mask in masks.values()]
    asked = list(zip(masks, rows, strict=True))
    scored = base.head.logprobs(
        hidden,
        [Piece(tile.segment, own + tile.segment.start) for tile, own in asked],
        [tile.targets[own] for tile, own in asked],
    )
    for (tile, own), logprobs in zip(asked, scored, strict=True):
        sampled, log_ratio = tile.inputs.logprobs, torch.zeros_like(masks[tile])
        assert sampled is not None
        log_ratio[own] = logprobs - sampled[own]
        ratios = sequence_log_ratios(log_ratio, masks[tile], tile.lengths)
        inputs[tile] = replace(tile.inputs, sequence_log_ratios=ratios)
    return list(inputs.values())


def tile_result(packed: PackedTile, logprobs: NDArray[np.float32], loss: float) -> TileResult:
    """What a tile comes to, from the logprobs of its scored places, [scored] or [scored, k], and
    its loss.
    """
    weighted = [int(d.weighted.sum()) for d in packed.tile.documents]
    counts = weighted if packed.tile.weighted_only else list(packed.lengths)
    if not (math.isfinite(loss) and np.isfinite(logprobs).all()):
        # What of it is in the gradient stays there: the run's step must not be taken, ever.
        return TileResult(error=LossNotFinite("a logprob" if math.isfinite(loss) else "the loss"))
    return TileResult(
        logprobs=tuple(
            logprobs[end - count : end].copy()
            for end, count in zip(itertools.accumulate(counts), counts, strict=True)
        ),
        metrics={
            "loss:sum": loss,
            "tokens:sum": float(sum(packed.lengths)),
            "weighted_tokens:sum": float(sum(weighted)),
        },
    )


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros(0)

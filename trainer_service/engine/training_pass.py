"""One pass over a packed plan: logprobs of all tiles, their losses, and the gradients into the
rows.

Two passes over the head: the first computes logprobs, the losses are pure functions of them, and
the second runs only where a loss depends on the logprob.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mint_core.model.attention import PackedAttention
from mint_core.model.head import Piece
from mint_core.model.loading import LoadedBase
from trainer_service.engine.losses import LossInputs, differentiate
from trainer_service.engine.packing import PackedPlan, PackedTile
from trainer_service.jobs import TileResult


def run_pass(base: LoadedBase, plan: PackedPlan) -> tuple[TileResult, ...]:
    """Computes a plan and adds the gradients of its backward tiles."""
    backward = any(tile.tile.backward for tile in plan.tiles)
    segments = tuple(tile.segment for tile in plan.tiles)
    with torch.set_grad_enabled(backward):
        hidden = base.hidden(plan.tokens, plan.positions, segments, PackedAttention(plan.bounds))
    logprobs = _score(base, hidden.detach(), plan.tiles)
    slopes, results = _evaluate(plan.tiles, logprobs)
    if backward:
        _propagate(base, hidden, plan.tiles, slopes)
    return results


def _score(base: LoadedBase, hidden: Tensor, tiles: Sequence[PackedTile]) -> list[Tensor]:
    pieces = [Piece(t.segment, t.scored + t.segment.start) for t in tiles if len(t.scored)]
    targets = [t.targets[t.scored] for t in tiles if len(t.scored)]
    scored = iter(base.head.logprobs(hidden, pieces, targets))
    return [next(scored) if len(t.scored) else hidden.new_zeros(0) for t in tiles]


def _evaluate(
    tiles: Sequence[PackedTile], logprobs: Sequence[Tensor]
) -> tuple[list[Tensor], tuple[TileResult, ...]]:
    """Per tile d loss / d logprob of the scored positions, [scored], and the results."""
    slopes, results = [], []
    for tile, scores in zip(tiles, logprobs, strict=True):
        losses, slope = differentiate(tile.tile.loss, scores, _at(tile.inputs, tile.scored))
        slopes.append(slope)
        results.append(_result(tile, scores, losses))
    return slopes, tuple(results)


def _at(inputs: LossInputs, places: Tensor) -> LossInputs:
    return LossInputs(
        weights=inputs.weights[places],
        logprobs=None if inputs.logprobs is None else inputs.logprobs[places],
        advantages=None if inputs.advantages is None else inputs.advantages[places],
    )


def _result(tile: PackedTile, scores: Tensor, losses: Tensor) -> TileResult:
    counts = _scored_counts(tile)
    weights = tile.inputs.weights
    return TileResult(
        logprobs=tuple(part.cpu().numpy().copy() for part in scores.split(counts)),
        metrics={
            "loss:sum": losses.double().sum().item(),
            "tokens:sum": float(sum(tile.lengths)),
            "weighted_tokens:sum": float((weights != 0).sum().item()),
        },
    )


def _scored_counts(tile: PackedTile) -> list[int]:
    if not tile.tile.weighted_only:
        return list(tile.lengths)
    return [int((document.weights != 0).sum()) for document in tile.tile.documents]


def _propagate(
    base: LoadedBase, hidden: Tensor, tiles: Sequence[PackedTile], slopes: Sequence[Tensor]
) -> None:
    pieces, targets, upstream = [], [], []
    for tile, slope in zip(tiles, slopes, strict=True):
        steep = torch.nonzero(slope)[:, 0]
        if tile.tile.backward and len(steep):
            places = tile.scored[steep]
            pieces.append(Piece(tile.segment, places + tile.segment.start))
            targets.append(tile.targets[places])
            upstream.append(slope[steep])
    if pieces:
        hidden.backward(base.head.backward(hidden.detach(), pieces, targets, upstream))

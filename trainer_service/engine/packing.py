"""Lays the documents of a plan side by side in one stream, [tokens], without padding between."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint_core.lora.bank import AdapterRow
from mint_core.lora.layers import MIN_ROWS, Segment
from mint_core.model.routing import ROUTERS_CHOICE
from trainer_service.engine.losses import LossInputs
from trainer_service.jobs import Tile


@dataclass(frozen=True, slots=True, eq=False)
class PackedTile:
    """One tile in the stream. Its documents follow each other from `segment.start`."""

    tile: Tile
    segment: Segment
    lengths: tuple[int, ...]  # of its documents
    targets: Tensor  # [tile tokens], or [tile tokens, k]
    inputs: LossInputs
    scored: Tensor  # [scored] places in the tile that get a logprob
    ratio_mask: Tensor | None  # [tile tokens], 1 where a token counts in its sequence's ratio


@dataclass(frozen=True, slots=True, eq=False)
class PackedPlan:
    """The stream of a plan."""

    tiles: tuple[PackedTile, ...]  # in the plan's order
    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens], from 0 in each document
    bounds: list[int]  # of the documents
    routed: Tensor | None  # [tokens, L, k] experts, as of documents; None: nobody says any


def pack(
    tiles: Sequence[Tile],
    rows: Mapping[str, AdapterRow],
    device: torch.device,
    rows_computed: Callable[[int], int] = lambda tokens: tokens,  # that hold so many tokens
) -> PackedPlan:
    """Packs tiles in the order given.

    A tile shorter than MIN_ROWS is followed by a document of padding, since a matmul with fewer
    rows computes other last bits. Another at the end fills the stream up to what is computed.
    """
    packed, streams, bounds = [], [], [0]

    def fill(missing: int) -> None:
        if missing > 0:
            streams.append(np.zeros(missing, np.int64))
            bounds.append(bounds[-1] + missing)

    for tile in tiles:
        start = bounds[-1]
        for document in tile.documents:
            streams.append(document.tokens)
            bounds.append(bounds[-1] + len(document.tokens))
        fill(MIN_ROWS - (bounds[-1] - start))
        segment = Segment(start, bounds[-1], rows[tile.training_run_id], tile.backward)
        packed.append(_pack_tile(tile, segment, device))
    fill(rows_computed(bounds[-1]) - bounds[-1])
    positions = [np.arange(len(stream)) for stream in streams]
    return PackedPlan(
        tuple(packed),
        _joined(streams, device),
        _joined(positions, device),
        bounds,
        _routed(packed, bounds[-1], device),
    )


def _routed(tiles: Sequence[PackedTile], tokens: int, device: torch.device) -> Tensor | None:
    """The experts that documents name."""
    routed = None
    for tile in tiles:
        start = tile.segment.start
        for document in tile.tile.documents:
            stop = start + len(document.tokens)
            if document.routed is not None:
                if routed is None:
                    shape = tokens, *document.routed.shape[1:]
                    routed = torch.full(shape, ROUTERS_CHOICE, dtype=torch.int32)
                routed[start:stop] = torch.from_numpy(document.routed)
            start = stop
    return None if routed is None else routed.to(device)


def _pack_tile(tile: Tile, segment: Segment, device: torch.device) -> PackedTile:
    documents = tile.documents
    weighted = np.concatenate([d.weighted for d in documents])
    scored = np.flatnonzero(weighted) if tile.weighted_only else np.arange(len(weighted))
    inputs = LossInputs(
        weights=_joined([d.weights for d in documents], device),
        logprobs=_optional([d.logprobs for d in documents], device),
        advantages=_optional([d.advantages for d in documents], device),
        clip_low=_optional([d.clip_low for d in documents], device),
        clip_high=_optional([d.clip_high for d in documents], device),
    )
    return PackedTile(
        tile=tile,
        segment=segment,
        lengths=tuple(len(d.tokens) for d in documents),
        targets=_joined([d.targets for d in documents], device),
        inputs=inputs,
        scored=torch.from_numpy(scored).to(device),
        ratio_mask=_optional([d.ratio_mask for d in documents], device),
    )


def _optional(arrays: Sequence[np.ndarray | None], device: torch.device) -> Tensor | None:
    present = [array for array in arrays if array is not None]
    assert len(present) in (0, len(arrays)), "one loss reads the same inputs of every document"
    return _joined(present, device) if present else None


def _joined(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device)
